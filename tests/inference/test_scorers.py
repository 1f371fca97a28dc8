"""CLIP as a scorer, on a small model of open_clip's with weights from a local file."""

from pathlib import Path

import pytest
import torch

from lightning_dalle.errors import UserError
from lightning_dalle.inference.scorers import OpenCLIP, identity, open_clip_scorer

SMALL = "ViT-S-32-alt"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(open_clip.create_model(SMALL).state_dict(), path)
    return path


def test_scores_equal_open_clip_s_own(weights: Path) -> None:
    import open_clip

    images = torch.rand(3, 3, 224, 224)
    scores = open_clip_scorer(f"{SMALL}:{weights}").score(images, "a cat")
    model, _, preprocess = open_clip.create_model_and_transforms(SMALL, pretrained=str(weights))
    normalize = preprocess.transforms[-1]
    with torch.no_grad():
        image = model.eval().encode_image(normalize(images), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(SMALL)(["a cat"]), normalize=True)
    torch.testing.assert_close(scores, (image @ text.T)[:, 0], atol=1e-5, rtol=0)
    assert scores.unique().numel() == 3


def test_pictures_of_another_size_are_resized_as_open_clip_does(weights: Path) -> None:
    import open_clip
    from torchvision.transforms.v2 import functional

    image = functional.resize(torch.rand(1, 3, 8, 8), [256, 256], antialias=True)[0]
    ours = OpenCLIP(SMALL, str(weights)).score(image[None], "a cat")
    model, _, preprocess = open_clip.create_model_and_transforms(SMALL, pretrained=str(weights))
    with torch.no_grad():
        theirs = model.eval().encode_image(preprocess(functional.to_pil_image(image))[None], normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(SMALL)(["a cat"]), normalize=True)
    torch.testing.assert_close(ours, (theirs @ text.T)[:, 0], atol=2e-3, rtol=0)  # their pictures are of 8 bits


def test_a_scorer_is_known_by_its_weights(weights: Path, tmp_path: Path) -> None:
    other = torch.load(weights, weights_only=True)
    other["logit_scale"] += 1
    torch.save(other, tmp_path / "other.pt")
    one, again, another = (identity(OpenCLIP(SMALL, str(file))) for file in (weights, weights, tmp_path / "other.pt"))
    assert one == again
    assert one != another
    assert identity(None) is None


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="open_clip has no model ViT-None"):
        OpenCLIP("ViT-None", "openai")
    with pytest.raises(UserError, match=r"there is no file of CLIP weights at nowhere\.pt"):
        OpenCLIP(SMALL, "nowhere.pt")
    with pytest.raises(
        UserError, match="ViT-B-32 is a model of open_clip's, which needs its weights named too: ViT-B-32:"
    ):
        open_clip_scorer("ViT-B-32")
    with pytest.raises(UserError, match=r"there is no checkpoint at nowhere\.ckpt"):
        open_clip_scorer("nowhere.ckpt")
    broken = tmp_path / "broken.pt"
    broken.write_text("nothing")
    with pytest.raises(UserError, match=r"the CLIP weights .*broken.pt of ViT-S-32-alt cannot be had"):
        OpenCLIP(SMALL, str(broken))
