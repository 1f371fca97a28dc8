"""`export`: the written models equal those of the run, the model card is complete, and mistakes write nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_dalle import TextToImage
from lightning_dalle.checkpoints import load_clip, load_dalle, load_dvae, weights_digest
from lightning_dalle.cli import main
from lightning_dalle.errors import UserError
from lightning_dalle.tokenizer import CaptionTokenizer


@pytest.fixture(scope="module")
def release(tiny_run: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("releases") / "tiny"
    main(["export", "--checkpoint", str(tiny_run["dvae"].parent), "--out", str(out)])
    return out


def test_images_and_scores_equal_those_of_the_run(release: Path, tiny_run: dict[str, Path]) -> None:
    ours, theirs = (TextToImage.from_pretrained(path) for path in (tiny_run["dvae"].parent, release))
    for one, other in zip(
        *(pipeline("red apple", num_candidates=3, top=2) for pipeline in (ours, theirs)), strict=True
    ):
        assert one.image.tobytes() == other.image.tobytes()
        assert one[1:] == other[1:]
    assert theirs.attribution == ours.attribution


def test_every_exported_model_can_be_loaded(release: Path, tiny_run: dict[str, Path]) -> None:
    checkpoint = tiny_run["dalle"].with_suffix("") / "checkpoints" / "last.ckpt"
    dalle = load_dalle(release / "dalle.safetensors")
    assert weights_digest(dalle.dalle, dalle.dvae) == weights_digest(*load_dalle(checkpoint)[:2])
    assert weights_digest(load_dvae(release / "dalle.safetensors")) == weights_digest(load_dvae(checkpoint))
    assert not load_clip(release / "clip.safetensors").training


def test_hugging_face_tokenizers_opens_the_tokenizer(release: Path) -> None:
    from tokenizers import Tokenizer

    ours: CaptionTokenizer = load_dalle(release / "dalle.safetensors").tokenizer
    assert Tokenizer.from_file(str(release / "tokenizer.json")).encode("Red apple").ids == ours.encode("Red apple")


def test_training_state_is_not_exported(release: Path) -> None:
    names = load_file(release / "dalle.safetensors")
    assert {name.partition(".")[0] for name in names} == {"dalle", "dvae"}


def test_the_card_describes_data_and_attribution(release: Path) -> None:
    card = (release / "README.md").read_text()
    assert "class_path: lightning_dalle.data.sources.openmoji.OpenMoji" in card
    assert "CC BY-SA 4.0" in card
    assert "This model was not evaluated." in card  # the tiny run has no report
    assert json.loads((release / "config.json").read_text())["dvae"]["image_size"] == 32


def test_the_card_contains_results_and_protocols(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    result = Path("evals/results/openmoji_quickstart.json")
    main(["export", "--checkpoint", str(tiny_run["dalle"].with_suffix("") / "checkpoints" / "last.ckpt"), "--out",
          str(tmp_path / "out"), "--results", json.dumps([str(result)])])  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    psnr = json.loads(result.read_text())["reconstruction"]["dvae"]["psnr_db"]["value"]
    assert f"PSNR {psnr:.2f} dB" in card
    assert "samples_per_caption: 1" in card
    assert not (tmp_path / "out" / "clip.safetensors").exists()


def test_existing_folders_and_other_checkpoints_are_refused(
    tiny_run: dict[str, Path], tmp_path: Path, capsys: object
) -> None:
    from lightning_dalle.commands.export import export

    run = tiny_run["dvae"].parent
    with pytest.raises(UserError, match=r"already exists; choose another --out"):
        export(run, tmp_path)
    with pytest.raises(UserError, match=r"a DALL-E checkpoint is needed, but .* has only a dVAE: correct the path"):
        export(tiny_run["dvae"].with_suffix("") / "checkpoints" / "last.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


RESULT = json.loads(Path("evals/results/openmoji_quickstart.json").read_text())


@pytest.mark.parametrize(
    ("results", "out", "message"),
    [
        (
            ["a/report.json", "b/report.json"],
            "out",
            r"two --results are called report, the second is .*b/report\.json; rename one of them",
        ),
        (["uncommitted.json"], "out", r"uncommitted\.json is not a result of .*, choose another: KeyError\('commit'\)"),
        ([], "a/report.json/out", r"cannot create the output folder .*report\.json \("),
        ([], "/proc/out", r"cannot create the output folder /proc/out.* \("),
        ([], "a/report.json/x/out", r"cannot create the output folder .*report\.json/x \("),
    ],
)
def test_a_mistake_writes_nothing(
    dalle_checkpoint: Path, tmp_path: Path, results: list[str], out: str, message: str
) -> None:
    from lightning_dalle.commands.export import export

    folder = tmp_path / "folder"
    for file, result in {
        "a/report.json": RESULT,
        "b/report.json": RESULT,
        "uncommitted.json": {key: value for key, value in RESULT.items() if key != "commit"},
    }.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(result))
    with pytest.raises(UserError, match=message):
        export(dalle_checkpoint, folder / out, results=[folder / result for result in results])
    assert {path.name for path in folder.iterdir()} == {"a", "b", "uncommitted.json"}


def test_a_run_without_a_data_config_is_reported_in_the_card(dalle_checkpoint: Path, tmp_path: Path) -> None:
    from lightning_dalle.commands.export import export

    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(dalle_checkpoint.read_bytes())
    (tmp_path / "run" / "config.yaml").write_text("seed_everything: 1\n")
    export(checkpoint, tmp_path / "out")
    assert "The training data is unknown" in (tmp_path / "out" / "README.md").read_text()


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    save_file({"dvae.x": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match=r"theirs\.safetensors is not .* lacks the key lightning_dalle; give a file"):
        load_dvae(tmp_path / "theirs.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"cannot read .*broken\.safetensors as a safetensors file"):
        load_dvae(tmp_path / "broken.safetensors")
