"""What `export` writes is opened by others, and says what it is."""

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


def test_its_pictures_and_scores_are_the_run_s(release: Path, tiny_run: dict[str, Path]) -> None:
    ours, theirs = (TextToImage.from_pretrained(path) for path in (tiny_run["dvae"].parent, release))
    for one, other in zip(*(draw("red apple", num_candidates=3, top=2) for draw in (ours, theirs)), strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        assert one[1:] == other[1:]
    assert theirs.attribution == ours.attribution


def test_every_model_of_it_opens_alone(release: Path, tiny_run: dict[str, Path]) -> None:
    checkpoint = tiny_run["dalle"].with_suffix("") / "checkpoints" / "last.ckpt"
    dalle = load_dalle(release / "dalle.safetensors")
    assert weights_digest(dalle.dalle, dalle.dvae) == weights_digest(*load_dalle(checkpoint)[:2])
    assert weights_digest(load_dvae(release / "dalle.safetensors")) == weights_digest(load_dvae(checkpoint))
    assert not load_clip(release / "clip.safetensors").training


def test_its_tokenizer_opens_in_hugging_faces(release: Path) -> None:
    from tokenizers import Tokenizer

    ours: CaptionTokenizer = load_dalle(release / "dalle.safetensors").tokenizer
    assert Tokenizer.from_file(str(release / "tokenizer.json")).encode("Red apple").ids == ours.encode("Red apple")


def test_nothing_of_the_training_is_in_it(release: Path) -> None:
    names = load_file(release / "dalle.safetensors")
    assert {name.partition(".")[0] for name in names} == {"dalle", "dvae"}


def test_its_card_says_what_it_was_trained_on_and_how_it_was_measured(release: Path) -> None:
    card = (release / "README.md").read_text()
    assert "class_path: lightning_dalle.data.sources.openmoji.OpenMoji" in card
    assert "CC BY-SA 4.0" in card
    assert "Nothing has been measured of it." in card  # the tiny run has no report
    assert json.loads((release / "config.json").read_text())["dvae"]["image_size"] == 32


def test_its_card_has_the_figures_and_their_protocols(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    result = Path("evals/results/openmoji_quickstart.json")
    main(["export", "--checkpoint", str(tiny_run["dalle"].with_suffix("") / "checkpoints" / "last.ckpt"), "--out",
          str(tmp_path / "out"), "--results", json.dumps([str(result)])])  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    psnr = json.loads(result.read_text())["reconstruction"]["dvae"]["psnr_db"]["value"]
    assert f"PSNR {psnr:.2f} dB" in card
    assert "samples_per_prompt: 1" in card
    assert not (tmp_path / "out" / "clip.safetensors").exists()


def test_nothing_is_written_over_or_in_vain(tiny_run: dict[str, Path], tmp_path: Path, capsys: object) -> None:
    from lightning_dalle.commands.export import export

    run = tiny_run["dvae"].parent
    with pytest.raises(UserError, match="is there already"):
        export(run, tmp_path)
    with pytest.raises(UserError, match=r"a DALL-E checkpoint is needed, but .* is a dVAE's checkpoint"):
        export(tiny_run["dvae"].with_suffix("") / "checkpoints" / "last.ckpt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


RESULT = json.loads(Path("evals/results/openmoji_quickstart.json").read_text())


@pytest.mark.parametrize(
    ("results", "out", "message"),
    [
        (["a/report.json", "b/report.json"], "out", r"two --results are called report, .*b/report\.json the second"),
        (["uncommitted.json"], "out", r"uncommitted\.json is no result of lightning_dalle: KeyError\('commit'\)"),
        ([], "a/report.json/out", r"the folder .*report\.json is to be written into, but cannot be made"),
        ([], "/proc/out", r"the folder /proc/out.* is to be written into, but cannot be made"),
        ([], "a/report.json/x/out", r"the folder .*report\.json/x is to be written into, but cannot be made"),
    ],
)
def test_a_mistake_leaves_no_half_release(
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


def test_a_config_without_data_tells_nothing_of_them(dalle_checkpoint: Path, tmp_path: Path) -> None:
    from lightning_dalle.commands.export import export

    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(dalle_checkpoint.read_bytes())
    (tmp_path / "run" / "config.yaml").write_text("seed_everything: 1\n")
    export(checkpoint, tmp_path / "out")
    assert "what data it is of is not known here" in (tmp_path / "out" / "README.md").read_text()


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    save_file({"dvae.x": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    with pytest.raises(UserError, match="lightning_dalle did not write it"):
        load_dvae(tmp_path / "theirs.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is not a safetensors file that can be opened"):
        load_dvae(tmp_path / "broken.safetensors")
