"""`data overlap` on real photos: planted copies are listed, rendered, and not trained on when the list is used."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from forms import Photo, image_folder, squares
from PIL import Image
from planted import make_copy

from lightning_dalle.cli import main
from lightning_dalle.commands.data import read_datamodule


def config(folder: Path, data: Path, **options: object) -> Path:
    source = {
        "class_path": "lightning_dalle.data.sources.captioned.CaptionedImages",
        "init_args": {"path": str(data), **options},
    }
    file = folder / "fit.yaml"
    keys = {"source": source, "image_size": 32, "batch_size": 4, "text_len": 8, "vocab_size": 300}
    file.write_text(yaml.safe_dump({"model": "ignored", "data": keys}))
    return file


def listed(file: Path) -> dict[str, str]:
    """Return the match of each listed record."""
    with file.open(newline="") as lines:
        return {line["id"]: line["match"] for line in csv.DictReader(lines, dialect="excel-tab")}


@pytest.fixture
def polluted(real_data: Path, tmp_path: Path) -> Path:
    """Write eight training photos of COCO, copies of three validation photos, and a file that is not an image."""
    photos = [
        Photo(path.read_bytes(), ["a photo"], path.stem) for path in sorted((real_data / "coco/train").iterdir())[:8]
    ]
    for number, path in enumerate(sorted((real_data / "coco/val").glob("*.jpg"))[:3]):
        file = tmp_path / "copy.png"
        make_copy(Image.open(path).convert("RGB"), "all, cropped by a tenth", path.stem).save(file)
        photos.append(Photo(file.read_bytes(), ["a copy"], f"copy {number}"))
    photos.append(Photo(b"not an image", ["a caption"], "broken"))
    image_folder(tmp_path / "data", {"train": photos, "validation": squares(2)})
    return tmp_path / "data"


def test_copies_of_a_reference_are_listed_and_then_not_trained_on(
    polluted: Path, real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = config(tmp_path, polluted)
    out = tmp_path / "overlap"
    main(["data", "overlap", "--config", str(fit), "--reference", str(real_data / "coco/val"), "--out", str(out)])
    names = [path.name for path in sorted((real_data / "coco/val").glob("*.jpg"))[:3]]
    assert listed(out / "excluded.tsv") == {f"copy {number}": name for number, name in enumerate(names)}
    assert json.loads((out / "overlap.json").read_text())["images"] == {
        "reference": {"read": 200}, "train": {"read": 11, "unreadable image": 1}
    }  # fmt: skip
    assert Image.open(out / "borderline.png").width > 300
    assert "3 near-duplicates" in capsys.readouterr().out
    excluded = {
        "class_path": "lightning_dalle.data.filters.exclusions.Excluded",
        "init_args": {"file": str(out / "excluded.tsv")},
    }
    data = read_datamodule(fit, {"filters": [excluded]})
    data.setup("fit")
    assert data.rejected["train"] == {"on the exclusion list": 3, "unreadable image": 1}


def test_the_reference_may_be_tiff_avif_and_gif_and_other_files_are_reported(
    polluted: Path, real_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    suffixes = (".tiff", ".avif", ".gif")
    for path, suffix in zip(sorted((real_data / "coco/val").glob("*.jpg")), suffixes, strict=False):
        Image.open(path).convert("RGB").save(reference / f"{path.stem}{suffix}")
    (reference / "captions.json").write_text("{}")
    fit, out = config(tmp_path, polluted), tmp_path / "overlap"
    main(["data", "overlap", "--config", str(fit), "--reference", str(reference), "--out", str(out)])
    assert sorted(Path(match).suffix for match in listed(out / "excluded.tsv").values()) == sorted(suffixes)
    assert json.loads((out / "overlap.json").read_text())["images"]["reference"] == {"read": 3}
    assert f"{reference}/: ignored 1 file that is not an image (1 .json)" in caplog.text


def test_the_first_of_duplicate_training_photos_is_kept(real_data: Path, tmp_path: Path) -> None:
    fit = config(tmp_path, real_data / "coco")
    main(["data", "overlap", "--config", str(fit), "--within", "true", "--out", str(tmp_path / "overlap")])
    assert listed(tmp_path / "overlap" / "excluded.tsv") == {"554625": "318219"}  # COCO has this photo twice


def test_streamed_data_is_compared_with_a_reference_of_another_format(
    polluted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = config(tmp_path, polluted, streaming=True)
    arguments = ["data", "overlap", "--config", str(fit), "--out", str(tmp_path / "overlap")]
    main([*arguments, "--reference", str(polluted / "train" / "metadata.jsonl"), "--reference_split", "train"])
    assert len(listed(tmp_path / "overlap" / "excluded.tsv")) == 11


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --reference or --within true; this command has neither"),
        (["--within", "true", "--reference", "val"], "give either --reference or --within true; this command has both"),
        (["--within", "true", "--threshold", "1.5"], "threshold is 1.5, but must be between 0 and 1"),
        (["--within", "true", "--data.source.init_args.streaming", "true"], "set `streaming: false`"),
        (["--reference", "tests/tiny"], "tests/tiny: it has"),
    ],
)
def test_invalid_arguments_are_refused_with_the_remedy(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(tmp_path / "data", {"train": squares(2), "validation": squares(2)})
    fit = config(tmp_path, tmp_path / "data")
    with pytest.raises(SystemExit, match="2"):
        main(["data", "overlap", "--config", str(fit), "--out", str(tmp_path / "overlap"), *arguments])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "overlap").exists()


def test_existing_results_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(tmp_path / "data", {"train": squares(2), "validation": squares(2)})
    fit, out = config(tmp_path, tmp_path / "data"), tmp_path / "overlap"
    out.mkdir()
    (out / "excluded.tsv").write_text("id\n7\n")
    with pytest.raises(SystemExit, match="2"):
        main(["data", "overlap", "--config", str(fit), "--within", "true", "--out", str(out)])
    assert "excluded.tsv already exists; choose another --out" in capsys.readouterr().err
    assert (out / "excluded.tsv").read_text() == "id\n7\n"
