"""Captioned pictures from every local form, and what is wrong with them said in a sentence."""

import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from forms import FORMS, Photo, csv_of_paths, image_folder, pairs, squares, tars
from PIL import Image

from lightning_dalle.data.images.decoding import read_picture
from lightning_dalle.data.sources import formats
from lightning_dalle.data.sources.captioned import CaptionedPictures, complete
from lightning_dalle.data.sources.columns import Columns
from lightning_dalle.errors import UserError

SPLITS = {"train": squares(4), "validation": squares(3, first=4)}


def load(path: Path, **options: Any) -> Any:
    return CaptionedPictures(path=str(path), **options).load(32)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_records_by_its_path_alone(form: str, streamed: bool, tmp_path: Path) -> None:
    FORMS[form](tmp_path / "data", SPLITS)
    splits = load(tmp_path / "data", streamed=streamed)
    assert list(splits) == ["train", "val"]
    for split, photos in zip(splits.values(), SPLITS.values(), strict=True):
        rows = list(split)
        assert sorted(tuple(row["captions"]) for row in rows) == sorted(tuple(photo.captions) for photo in photos)
        for row in rows:
            [photo] = [photo for photo in photos if photo.captions == row["captions"]]
            assert row["id"].rpartition("/")[2] == photo.id
            picture = read_picture(row["image"]) if streamed else row["image"]
            assert picture.getpixel((0, 0)) == (int(photo.id) - 100, 0, 0)


def test_real_coco(real_data: Path) -> None:
    splits = load(real_data / "coco")
    assert {name: len(split) for name, split in splits.items()} == {"train": 130, "val": 200}
    assert splits["val"][0]["id"] == "632"
    assert len(splits["val"][0]["captions"]) == 5


def test_real_cc12m_is_read_whole_and_streamed_alike(real_data: Path) -> None:
    path = real_data / "webtext" / "cc12m_sample_32.tar"
    whole, streamed = load(path), load(path, streamed=True)
    assert [len(split) for split in whole.values()] == [31, 1]
    for split in ("train", "val"):
        assert list(whole[split]["captions"]) == [row["captions"] for row in streamed[split]]
        assert list(whole[split]["id"]) == [row["id"] for row in streamed[split]]


def test_one_file_is_enough(tmp_path: Path) -> None:
    csv_of_paths(tmp_path, {"all": squares(4)})
    tars(tmp_path / "tars", {"all": squares(9)})
    assert sum(len(split) for split in load(tmp_path / "all.csv").values()) == 4
    assert sum(len(split) for split in load(tmp_path / "tars" / "all-0001.tar").values()) == 3
    url = f"file://{tmp_path}/tars/all-{{0000..0002}}.tar"
    assert sum(len(split) for split in load(url).values()) == 9


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_folder_without_splits_gets_a_val_that_is_the_same_everywhere(streamed: bool, tmp_path: Path) -> None:
    pairs(tmp_path, {".": squares(100)})
    splits = load(tmp_path, streamed=streamed)
    ids = {name: {row["id"] for row in split} for name, split in splits.items()}
    assert ids["val"] == {"140", "154", "155", "170", "189"}
    assert len(ids["train"] | ids["val"]) == 100
    assert not ids["train"] & ids["val"]


def test_a_single_pair_is_val_for_want_of_another(tmp_path: Path) -> None:
    pairs(tmp_path, {".": squares(2)})
    assert {name: len(split) for name, split in load(tmp_path).items()} == {"train": 1, "val": 1}


def test_the_names_of_pictures_are_no_names_of_splits(tmp_path: Path) -> None:
    train = [Photo(photo.content, photo.captions, f"test dog {photo.id}") for photo in squares(3)]
    pairs(tmp_path, {"train": train, "val": squares(2)})
    assert {name: len(split) for name, split in load(tmp_path).items()} == {"train": 3, "val": 2}


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    pairs(tmp_path, {"train": squares(3)})
    load(tmp_path)
    (tmp_path / "train" / "101.txt").write_text("something else entirely")
    assert ["something else entirely"] in [*load(tmp_path)["train"]["captions"], *load(tmp_path)["val"]["captions"]]


def test_texts_in_capitals_are_read_and_what_stands_alone_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jpg", "B.JPG", "alone.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("a.txt", "B.TXT", "lost.txt", "no_picture.txt"):
        (tmp_path / name).write_text(f"a caption of {name}")
    with caplog.at_level(logging.WARNING):
        rows = CaptionedPictures(path=str(tmp_path)).load(8)
    captions = sorted(caption for split in rows.values() for (caption,) in split["captions"])
    assert captions == ["a caption of B.TXT", "a caption of a.txt"]
    assert "passed over 1 pictures without a text and 2 texts without a picture" in caplog.text


def test_broken_tars_are_read_as_far_as_they_go(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tars(tmp_path, {"train": squares(30), "val": squares(3)})
    whole = (tmp_path / "train-0001.tar").read_bytes()
    (tmp_path / "train-0001.tar").write_bytes(whole[: 3 * 2048 + 522])  # in the middle of the fourth picture
    (tmp_path / "train-0002.tar").write_bytes(b"no tar")
    with tarfile.open(tmp_path / "train-0003.tar", "w") as tar:  # JSON that is none, text that is no UTF-8
        for name, content in (("1.json", b"{"), ("1.jpg", b"x"), ("2.json", b"[1]"), ("2.txt", b"\xff\xfe")):
            (tmp_path / "content").write_bytes(content)
            tar.add(tmp_path / "content", name)
    rows = list(load(tmp_path, streamed=True)["train"])
    assert [len(row["captions"]) for row in rows][:10] == [2] * 10
    assert len(rows) == 10 + 3 + 2
    assert [row["captions"] for row in rows[-2:]] == [[], []]
    assert sum("is read as far as it goes" in message for message in caplog.messages) == 2


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_broken_line_or_sample_costs_itself_alone(streamed: bool, tmp_path: Path) -> None:
    csv_of_paths(tmp_path / "table", SPLITS)
    with (tmp_path / "table" / "train.csv").open("a") as file:
        file.write("a,b,c,d,e\npictures/100.jpg,the last,999\n")
    with pytest.warns(Warning, match="Skipping line"):
        rows = list(load(tmp_path / "table", streamed=streamed)["train"])
    assert [row["id"] for row in rows] == ["100", "101", "102", "103", "999"]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train.tar", "w") as tar:
        for name, content in (("1.json", b'{"caption": "a cat"}'), ("1.jpg", b"x"), ("2.json", b"{"), ("2.jpg", b"x")):
            (tmp_path / "content").write_bytes(content)
            tar.add(tmp_path / "content", name)
    rows = load(tmp_path / "tars", streamed=streamed, splits={"train": "train"})["train"].select_columns("captions")
    assert [row["captions"] for row in rows] == [["a cat"], []]


def test_a_broken_line_of_streamed_json_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps({"path": f"{i}.jpg", "meta": {"alt": f"cat {i}"}}) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(["[1]", *lines[:6], '{"path": "6.jp', "", *lines[6:]]))
    rows = list(load(tmp_path, streamed=True, captions="meta.alt", splits={"train": "train"})["train"])
    assert [row["captions"] for row in rows] == [[f"cat {i}"] for i in range(8)]
    assert rows[0]["image"]["path"] == str(tmp_path / "0.jpg")
    assert f"{tmp_path}/train.jsonl: passed over 2 lines that are no JSON" in caplog.text


class Interrupted(io.BytesIO):
    """Breaks off after so many bytes, as a network does."""

    good = 2000

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self.good:
            raise OSError("connection reset")
        return super().read(size)


def test_a_url_that_fails_is_asked_again_and_goes_on_or_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars(tmp_path, {"train": squares(36)})
    url = f"file://{tmp_path}/train-0000.tar"
    content, whole = (tmp_path / "train-0000.tar").read_bytes(), [row["__key__"] for row in formats.samples(url)]
    monkeypatch.setattr(files, "PAUSE", 0.0)
    opened: list[io.BytesIO] = []

    def open_url(*_: Any) -> io.BytesIO:
        opened.append(Interrupted(content) if len(opened) < failures else io.BytesIO(content))
        return opened[-1]

    monkeypatch.setattr(fsspec, "open", open_url)
    failures = 2
    assert [row["__key__"] for row in formats.samples(url)] == whole
    opened, failures = [], 3
    with pytest.raises(UserError, match=r"train-0000.tar cannot be read, after 5 records: connection reset"):
        list(formats.samples(url))
    opened, failures = [], 1
    with pytest.raises(UserError, match="connection reset"):  # a disk is not asked again
        list(formats.samples(str(tmp_path / "train-0000.tar")))


def test_records_without_a_picture_or_a_caption_are_counted_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image_folder(tmp_path, SPLITS)
    with (tmp_path / "train" / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "lost.png", "captions": ["a"]}\n{"file_name": "100.jpg", "captions": [" "]}')
    with caplog.at_level(logging.WARNING):
        rows, passed_over = complete(load(tmp_path)["train"], "the data")
    assert len(rows) == 4
    assert passed_over == {"without a picture": 1, "without a caption": 1}
    assert "the data: passed over 1 without a picture, 1 without a caption, of 6 records" in caplog.text


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_mistakes_are_sentences(streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    image_folder(tmp_path / "data", SPLITS)
    csv_of_paths(tmp_path / "table", SPLITS)
    tars(tmp_path / "tars", SPLITS)

    def mistake(match: str, path: str, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            load(tmp_path / path, streamed=streamed, **options)

    mistake("captions is to be the column text, but .* has captions, image, image_id", "data", captions="text")
    mistake(
        "captions is the column image_id of .* holds int64; there are file_name, Caption", "table", captions="image_id"
    )
    mistake(
        "image is to be the column png, but .* has __key__, jpg, json, json.captions, json.image_id",
        "tars",
        image="png",
    )
    mistake("splits are to be test, but .* has train, validation", "data", splits={"val": "test"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    mistake(r"pictures with a .txt of the same name: .*empty has 1 \.md", "empty")
    mistake(r"cannot be read from .*nowhere \(no local folder or file, and the hub's\)", "nowhere")
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    mistake(r"cannot be read from .*broken.parquet \(local, as .parquet\)", "broken.parquet")


def test_a_picture_without_an_id_is_called_by_what_it_is() -> None:
    """By the same name for ever: which records are `val` and which are excluded hang on it."""
    columns = Columns.choose({"image": [], "caption": []}, {"image": None, "captions": None, "id": None}, Path("/"), "")
    rows = {"image": [b"a picture", {"bytes": None, "path": "a.png"}, None], "caption": ["x", "y", "z"]}
    assert columns.records(rows)["id"] == ["ec3e5a5e7de02ff2", "f312fd6dc8c1eb8f", "2d06800538d394c2"]
