"""`data overlap` on real photos: what is planted is listed, shown, and not trained on once the list is honoured."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from forms import Photo, image_folder, squares
from PIL import Image
from planted import planted

from lightning_dalle.cli import main
from lightning_dalle.commands.data import read_datamodule


def config(folder: Path, data: Path, **options: object) -> Path:
    source = {
        "class_path": "lightning_dalle.data.sources.captioned.CaptionedPictures",
        "init_args": {"path": str(data), **options},
    }
    file = folder / "fit.yaml"
    keys = {"source": source, "image_size": 32, "batch_size": 4, "text_len": 8, "vocab_size": 300}
    file.write_text(yaml.safe_dump({"model": "of no concern", "data": keys}))
    return file


def listed(file: Path) -> dict[str, str]:
    """The match of each record on the list."""
    with file.open(newline="") as lines:
        return {line["id"]: line["match"] for line in csv.DictReader(lines, dialect="excel-tab")}


@pytest.fixture
def polluted(real_data: Path, tmp_path: Path) -> Path:
    """Eight training photos of COCO, copies of three of its validation photos, and a file that is no picture."""
    photos = [
        Photo(path.read_bytes(), ["a photo"], path.stem) for path in sorted((real_data / "coco/train").iterdir())[:8]
    ]
    for number, path in enumerate(sorted((real_data / "coco/val").glob("*.jpg"))[:3]):
        file = tmp_path / "copy.png"
        planted(Image.open(path).convert("RGB"), "all, cropped by a tenth", path.stem).save(file)
        photos.append(Photo(file.read_bytes(), ["a copy"], f"copy {number}"))
    photos.append(Photo(b"no picture", ["a caption"], "broken"))
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
    assert json.loads((out / "overlap.json").read_text())["pictures"] == {
        "reference": {"read": 200}, "train": {"read": 11, "unreadable picture": 1}
    }  # fmt: skip
    assert Image.open(out / "borderline.png").width > 300
    assert "3 near-duplicates" in capsys.readouterr().out
    excluded = {
        "class_path": "lightning_dalle.data.filters.exclusions.Excluded",
        "init_args": {"list": str(out / "excluded.tsv")},
    }
    data = read_datamodule(fit, {"filters": [excluded]})
    data.setup("fit")
    assert data.rejected["train"] == {"on the list of exclusions": 3, "unreadable picture": 1}


def test_of_training_photos_that_are_alike_the_first_stays(real_data: Path, tmp_path: Path) -> None:
    fit = config(tmp_path, real_data / "coco")
    main(["data", "overlap", "--config", str(fit), "--within", "true", "--out", str(tmp_path / "overlap")])
    assert listed(tmp_path / "overlap" / "excluded.tsv") == {"554625": "318219"}  # COCO has this photo twice


def test_streamed_data_is_compared_with_a_reference_of_any_form(
    polluted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = config(tmp_path, polluted, streamed=True)
    arguments = ["data", "overlap", "--config", str(fit), "--out", str(tmp_path / "overlap")]
    main([*arguments, "--reference", str(polluted / "train" / "metadata.jsonl"), "--reference_split", "train"])
    assert len(listed(tmp_path / "overlap" / "excluded.tsv")) == 11


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give either --reference or --within true"),
        (["--within", "true", "--reference", "val"], "give either --reference or --within true"),
        (["--within", "true", "--threshold", "1.5"], "threshold is 1.5, but distances are from 0 to 1"),
        (["--within", "true", "--data.source.init_args.streamed", "true"], "but the data is streamed"),
        (["--reference", "tests/tiny"], "tests/tiny has"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image_folder(tmp_path / "data", {"train": squares(2), "validation": squares(2)})
    fit = config(tmp_path, tmp_path / "data")
    with pytest.raises(SystemExit, match="2"):
        main(["data", "overlap", "--config", str(fit), "--out", str(tmp_path / "overlap"), *arguments])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "overlap").exists()


def test_nothing_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(tmp_path / "data", {"train": squares(2), "validation": squares(2)})
    fit, out = config(tmp_path, tmp_path / "data"), tmp_path / "overlap"
    out.mkdir()
    (out / "excluded.tsv").write_text("id\n7\n")
    with pytest.raises(SystemExit, match="2"):
        main(["data", "overlap", "--config", str(fit), "--within", "true", "--out", str(out)])
    assert "excluded.tsv is there already" in capsys.readouterr().err
    assert (out / "excluded.tsv").read_text() == "id\n7\n"
