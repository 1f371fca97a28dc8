"""Captioned pictures from every local form, and what is wrong with them said in a sentence."""

import io
import json
import logging
import tarfile
from pathlib import Path

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as EncodedImage
from PIL import Image

from lightning_dalle.data.captioned import CaptionedPictures, caption_list
from lightning_dalle.errors import UserError

CAPTIONS = [["a red square", "a square"], ["a green square"]]


def encoded(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def image_folder(root: Path) -> None:
    for split in ("train", "validation"):
        folder = root / split
        folder.mkdir(parents=True)
        lines = []
        for i, captions in enumerate(CAPTIONS):
            (folder / f"{i}.png").write_bytes(encoded(i))
            lines.append(json.dumps({"file_name": f"{i}.png", "image_id": 100 + i, "captions": captions}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))


def parquet(root: Path) -> None:
    root.mkdir()
    features = Features(image=EncodedImage(), captions=List(Value("string")), image_id=Value("int64"))
    rows = [
        {"image": {"bytes": encoded(i), "path": None}, "captions": captions, "image_id": 100 + i}
        for i, captions in enumerate(CAPTIONS)
    ]
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=features).to_parquet(root / f"{split}.parquet")


def web_dataset(root: Path) -> None:
    root.mkdir()
    for split in ("train", "validation"):
        with tarfile.open(root / f"{split}-0000.tar", "w") as tar:
            for i, captions in enumerate(CAPTIONS):
                meta = json.dumps({"captions": captions, "image_id": 100 + i}).encode()
                for name, content in ((f"{i:06d}.png", encoded(i)), (f"{i:06d}.json", meta)):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("write", [image_folder, parquet, web_dataset])
def test_every_form_gives_the_same_records_by_its_path_alone(write, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    write(tmp_path / "data")
    splits = CaptionedPictures(path=str(tmp_path / "data")).load(32)
    assert set(splits) == {"train", "val"}
    for split in splits.values():
        assert split["captions"][:] == CAPTIONS
        assert split["id"][:] == ["100", "101"]
        assert [image.convert("RGB").getpixel((0, 0)) for image in split["image"]] == [(0, 0, 0), (1, 0, 0)]


def test_real_coco(real_data: Path) -> None:
    splits = CaptionedPictures(path=str(real_data / "coco")).load(128)
    assert {name: len(split) for name, split in splits.items()} == {"train": 130, "val": 200}
    assert splits["val"][0]["id"] == "632"
    assert len(splits["val"][0]["captions"]) == 5


def test_records_without_a_picture_or_a_caption_are_counted_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image_folder(tmp_path)
    with (tmp_path / "train" / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "lost.png", "captions": ["a cat"]}\n{"file_name": "0.png", "captions": [" "]}')
    with caplog.at_level(logging.WARNING):
        splits = CaptionedPictures(path=str(tmp_path)).load(32)
    assert len(splits["train"]) == 2
    assert "split train: passed over 1 without a picture, 1 without a caption, of 4 records" in caplog.text


def test_mistakes_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    image_folder(tmp_path / "data")
    path = str(tmp_path / "data")
    with pytest.raises(UserError, match=r"captions is to be the column text, but .* has captions, image, image_id"):
        CaptionedPictures(path=path, captions="text").load(32)
    with pytest.raises(UserError, match=r"splits are to be test, but .* has train, validation"):
        CaptionedPictures(path=path, splits={"val": "test"}).load(32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"cannot be read from .*empty \(the local folder\)"):
        CaptionedPictures(path=str(tmp_path / "empty")).load(32)


def test_captions_as_they_are_written_down() -> None:
    assert caption_list("a bird\n\n a red bird ") == ["a bird", "a red bird"]
    assert caption_list(["a", None, " "]) == ["a"]
    assert caption_list(None) == []
