"""CLIP scorers: open_clip's own scores, fingerprints, errors, and scorers named in a config."""

from pathlib import Path

import pytest
import torch

from lightning_dalle.errors import UserError
from lightning_dalle.inference.scorers import CLIPScorer, OpenCLIP, Scorer, fingerprint, load_scorer

SMALL = "ViT-S-32-alt"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(open_clip.create_model(SMALL).state_dict(), path)
    return path


def test_scores_equal_those_of_open_clip(weights: Path) -> None:
    import open_clip

    images = torch.rand(3, 3, 224, 224)
    scores = load_scorer(f"{SMALL}:{weights}").score(images, "a cat")
    model, _, preprocess = open_clip.create_model_and_transforms(SMALL, pretrained=str(weights))
    normalize = preprocess.transforms[-1]
    with torch.no_grad():
        image = model.eval().encode_image(normalize(images), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(SMALL)(["a cat"]), normalize=True)
    torch.testing.assert_close(scores, (image @ text.T)[:, 0], atol=1e-5, rtol=0)
    assert scores.unique().numel() == 3


def test_images_are_resized_as_in_open_clip(weights: Path) -> None:
    import open_clip
    from torchvision.transforms.v2 import functional

    image = functional.resize(torch.rand(1, 3, 8, 8), [256, 256], antialias=True)[0]
    ours = OpenCLIP(SMALL, str(weights)).score(image[None], "a cat")
    model, _, preprocess = open_clip.create_model_and_transforms(SMALL, pretrained=str(weights))
    with torch.no_grad():
        theirs = model.eval().encode_image(preprocess(functional.to_pil_image(image))[None], normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(SMALL)(["a cat"]), normalize=True)
    torch.testing.assert_close(ours, (theirs @ text.T)[:, 0], atol=2e-3, rtol=0)  # open_clip rounds images to 8 bits


def test_a_fingerprint_depends_on_the_weights(weights: Path, tmp_path: Path) -> None:
    other = torch.load(weights, weights_only=True)
    other["logit_scale"] += 1
    torch.save(other, tmp_path / "other.pt")
    one, again, another = (
        fingerprint(OpenCLIP(SMALL, str(file))) for file in (weights, weights, tmp_path / "other.pt")
    )
    assert one == again
    assert one != another
    assert fingerprint(None) is None


def test_unknown_models_and_weights_raise_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="open_clip has no model ViT-None: give one of "):
        OpenCLIP("ViT-None", "openai")
    with pytest.raises(
        UserError,
        match=r"the CLIP weights nowhere\.pt are neither a file nor open_clip's weights of ViT-S-32-alt: give",
    ):
        OpenCLIP(SMALL, "nowhere.pt")
    with pytest.raises(
        UserError, match="the open_clip model ViT-B-32 needs weights: give MODEL:WEIGHTS, such as ViT-B-32:"
    ):
        load_scorer("ViT-B-32")
    with pytest.raises(UserError, match=r"there is no checkpoint at nowhere\.ckpt: correct the path"):
        load_scorer("nowhere.ckpt")
    broken = tmp_path / "broken.pt"
    broken.write_text("nothing")
    with pytest.raises(
        UserError, match=r"cannot load the CLIP weights .*broken.pt into ViT-S-32-alt \(.*: give other weights"
    ):
        OpenCLIP(SMALL, str(broken))


class Ranking:
    """Class with a scorer, as an evaluation in a config has."""

    def __init__(self, scorer: Scorer | None = None) -> None:
        self.scorer = scorer


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("OpenCLIP", {"model": SMALL, "weights": "{weights}"}),
        ("load_scorer", {"name": SMALL + ":{weights}"}),
        ("CLIPScorer.from_checkpoint", {"checkpoint": "{checkpoint}"}),
    ],
)
def test_a_config_names_a_scorer_by_its_class_path(
    weights: Path, tiny_run: dict[str, Path], name: str, arguments: dict[str, str]
) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Ranking, "ranking")
    files = {"weights": weights, "checkpoint": tiny_run["dvae"].parent / "clip" / "checkpoints" / "last.ckpt"}
    scorer = {
        "class_path": f"lightning_dalle.inference.scorers.{name}",
        "init_args": {key: value.format(**files) for key, value in arguments.items()},
    }
    ranking = parser.instantiate(parser.parse_object({"ranking": {"scorer": scorer}})).ranking
    assert isinstance(ranking.scorer, CLIPScorer)
