"""Captioned images in every local format, and the messages for data that cannot be read."""

import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from forms import FORMATS, Photo, csv_of_paths, image_folder, pairs, squares, tars
from PIL import Image

from lightning_dalle.data.images.decoding import decode_pil
from lightning_dalle.data.sources import formats
from lightning_dalle.data.sources.captioned import CaptionedImages, drop_incomplete
from lightning_dalle.data.sources.columns import Columns
from lightning_dalle.errors import UserError

SPLITS = {"train": squares(4), "validation": squares(3, first=4)}


def load(path: Path, **options: Any) -> Any:
    return CaptionedImages(path=str(path), **options).load(32)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_detected_and_gives_the_same_records(format: str, streaming: bool, tmp_path: Path) -> None:
    FORMATS[format](tmp_path / "data", SPLITS)
    splits = load(tmp_path / "data", streaming=streaming)
    assert list(splits) == ["train", "val"]
    for split, photos in zip(splits.values(), SPLITS.values(), strict=True):
        rows = list(split)
        assert sorted(tuple(row["captions"]) for row in rows) == sorted(tuple(photo.captions) for photo in photos)
        for row in rows:
            [photo] = [photo for photo in photos if photo.captions == row["captions"]]
            assert row["id"].rpartition("/")[2] == photo.id
            image = decode_pil(row["image"]) if streaming else row["image"]
            assert image.getpixel((0, 0)) == (int(photo.id) - 100, 0, 0)


def test_real_coco(real_data: Path) -> None:
    splits = load(real_data / "coco")
    assert {name: len(split) for name, split in splits.items()} == {"train": 130, "val": 200}
    assert splits["val"][0]["id"] == "632"
    assert len(splits["val"][0]["captions"]) == 5


def test_real_cc12m_is_equal_with_and_without_streaming(real_data: Path) -> None:
    path = real_data / "webtext" / "cc12m_sample_32.tar"
    whole, streamed = load(path), load(path, streaming=True)
    assert [len(split) for split in whole.values()] == [31, 1]
    for split in ("train", "val"):
        assert list(whole[split]["captions"]) == [row["captions"] for row in streamed[split]]
        assert list(whole[split]["id"]) == [row["id"] for row in streamed[split]]


def test_a_path_may_be_one_file_or_a_url(tmp_path: Path) -> None:
    csv_of_paths(tmp_path, {"all": squares(4)})
    tars(tmp_path / "tars", {"all": squares(9)})
    assert sum(len(split) for split in load(tmp_path / "all.csv").values()) == 4
    assert sum(len(split) for split in load(tmp_path / "tars" / "all-0001.tar").values()) == 3
    url = f"file://{tmp_path}/tars/all-{{0000..0002}}.tar"
    assert sum(len(split) for split in load(url).values()) == 9


@pytest.mark.parametrize("streaming", [False, True])
def test_without_splits_val_depends_on_ids_alone(streaming: bool, tmp_path: Path) -> None:
    pairs(tmp_path, {".": squares(100)})
    splits = load(tmp_path, streaming=streaming)
    ids = {name: {row["id"] for row in split} for name, split in splits.items()}
    assert ids["val"] == {"140", "154", "155", "170", "189"}
    assert len(ids["train"] | ids["val"]) == 100
    assert not ids["train"] & ids["val"]


def test_val_has_at_least_one_record(tmp_path: Path) -> None:
    pairs(tmp_path, {".": squares(2)})
    assert {name: len(split) for name, split in load(tmp_path).items()} == {"train": 1, "val": 1}


def test_image_names_do_not_name_splits(tmp_path: Path) -> None:
    train = [Photo(photo.content, photo.captions, f"test dog {photo.id}") for photo in squares(3)]
    pairs(tmp_path, {"train": train, "val": squares(2)})
    assert {name: len(split) for name, split in load(tmp_path).items()} == {"train": 3, "val": 2}


def test_a_url_may_have_lists_and_several_ranges(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tars(tmp_path / name, {"train": squares(9), "val": squares(3)})
    url = f"file://{tmp_path}/{{a,b}}/{{train,val}}-{{0000..0002}}.tar"
    format, files = formats.detect_format(url)
    assert format == "tars"
    assert {split: len(found) for split, found in files.items()} == {"train": 6, "validation": 6}
    assert files["train"][4] == f"file://{tmp_path}/b/train-0001.tar"
    with pytest.raises(
        UserError, match=r"the braces in https://host/\{0000\.\.0002\.tar do not match; write one range"
    ):
        formats.detect_format("https://host/{0000..0002.tar")


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    pairs(tmp_path, {"train": squares(3)})
    load(tmp_path)
    (tmp_path / "train" / "101.txt").write_text("something else entirely")
    assert ["something else entirely"] in [*load(tmp_path)["train"]["captions"], *load(tmp_path)["val"]["captions"]]


def test_upper_case_suffixes_are_read_and_unpaired_and_ignored_files_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jpg", "B.JPG", "alone.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("a.txt", "B.TXT", "lost.txt", "no_image.txt", "notes.md"):
        (tmp_path / name).write_text(f"a caption of {name}")
    with caplog.at_level(logging.WARNING):
        rows = CaptionedImages(path=str(tmp_path)).load(8)
    captions = sorted(caption for split in rows.values() for (caption,) in split["captions"])
    assert captions == ["a caption of B.TXT", "a caption of a.txt"]
    assert f"{tmp_path}: skipped 1 images without a caption file and 2 caption files without an image" in caplog.text
    assert f"{tmp_path}/: ignored 1 file that is not an image (1 .md)" in caplog.text


def test_corrupt_tars_are_read_up_to_the_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tars(tmp_path, {"train": squares(30), "val": squares(3)})
    whole = (tmp_path / "train-0001.tar").read_bytes()
    (tmp_path / "train-0001.tar").write_bytes(whole[: 3 * 2048 + 522])  # in the middle of the fourth image
    (tmp_path / "train-0002.tar").write_bytes(b"no tar")
    with tarfile.open(tmp_path / "train-0003.tar", "w") as tar:  # invalid JSON, invalid UTF-8
        for name, content in (("1.json", b"{"), ("1.jpg", b"x"), ("2.json", b"[1]"), ("2.txt", b"\xff\xfe")):
            (tmp_path / "content").write_bytes(content)
            tar.add(tmp_path / "content", name)
    rows = list(load(tmp_path, streaming=True)["train"])
    assert [len(row["captions"]) for row in rows][:10] == [2] * 10
    assert len(rows) == 10 + 3 + 2
    assert [row["captions"] for row in rows[-2:]] == [[], []]
    assert "train-0001.tar is truncated or corrupt, only its first 3 records are used" in caplog.text
    assert "train-0002.tar is truncated or corrupt, only its first 0 records are used" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_only_the_invalid_line_or_json_is_skipped(streaming: bool, tmp_path: Path) -> None:
    csv_of_paths(tmp_path / "table", SPLITS)
    with (tmp_path / "table" / "train.csv").open("a") as file:
        file.write("a,b,c,d,e\nimages/100.jpg,the last,999\n")
    with pytest.warns(Warning, match="Skipping line"):
        rows = list(load(tmp_path / "table", streaming=streaming)["train"])
    assert [row["id"] for row in rows] == ["100", "101", "102", "103", "999"]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train.tar", "w") as tar:
        for name, content in (("1.json", b'{"caption": "a cat"}'), ("1.jpg", b"x"), ("2.json", b"{"), ("2.jpg", b"x")):
            (tmp_path / "content").write_bytes(content)
            tar.add(tmp_path / "content", name)
    rows = load(tmp_path / "tars", streaming=streaming, splits={"train": "train"})["train"].select_columns("captions")
    assert [row["captions"] for row in rows] == [["a cat"], []]


def test_invalid_lines_of_streamed_json_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps({"path": f"{i}.jpg", "meta": {"alt": f"cat {i}"}}) for i in range(8)]
    (tmp_path / "train.jsonl").write_text("\n".join(["[1]", *lines[:6], '{"path": "6.jp', "", *lines[6:]]))
    rows = list(load(tmp_path, streaming=True, captions="meta.alt", splits={"train": "train"})["train"])
    assert [row["captions"] for row in rows] == [[f"cat {i}"] for i in range(8)]
    assert rows[0]["image"]["path"] == str(tmp_path / "0.jpg")
    assert f"{tmp_path}/train.jsonl: skipped 2 lines that are not JSON objects" in caplog.text


class InterruptedFile(io.BytesIO):
    """File that raises an OSError after some bytes, as a network connection does."""

    readable = 2000

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() >= self.readable:
            raise OSError("connection reset")
        return super().read(size)


def test_a_failing_url_is_retried_and_resumed_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tars(tmp_path, {"train": squares(36)})
    url = f"file://{tmp_path}/train-0000.tar"
    content, whole = (tmp_path / "train-0000.tar").read_bytes(), [row["__key__"] for row in formats.read_tar(url)]
    monkeypatch.setattr(formats, "RETRY_SECONDS", 0.0)
    opened: list[io.BytesIO] = []

    def open_url(*_: Any) -> io.BytesIO:
        opened.append(InterruptedFile(content) if len(opened) < failures else io.BytesIO(content))
        return opened[-1]

    monkeypatch.setattr(fsspec, "open", open_url)
    failures = 2
    assert [row["__key__"] for row in formats.read_tar(url)] == whole
    opened, failures = [], 3
    with pytest.raises(
        UserError,
        match=r"train-0000.tar after 5 records: connection reset; check the file or the connection",
    ):
        list(formats.read_tar(url))
    opened, failures = [], 1
    with pytest.raises(UserError, match="connection reset"):  # local files are not retried
        list(formats.read_tar(str(tmp_path / "train-0000.tar")))


def test_records_without_an_image_or_a_caption_are_counted_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image_folder(tmp_path, SPLITS)
    with (tmp_path / "train" / "metadata.jsonl").open("a") as file:
        file.write('\n{"file_name": "lost.png", "captions": ["a"]}\n{"file_name": "100.jpg", "captions": [" "]}')
    with caplog.at_level(logging.WARNING):
        rows, skipped = drop_incomplete(load(tmp_path)["train"], "the data")
    assert len(rows) == 4
    assert skipped == {"missing image": 1, "missing caption": 1}
    assert "the data: skipped 1 missing image, 1 missing caption, of 6 records" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_unreadable_data_is_refused_with_the_remedy(
    streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    image_folder(tmp_path / "data", SPLITS)
    csv_of_paths(tmp_path / "table", SPLITS)
    tars(tmp_path / "tars", SPLITS)

    def check_error(match: str, path: str, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            load(tmp_path / path, streaming=streaming, **options)

    check_error(
        "data has no column text for the captions; set the source's `captions` to one of captions, image, image_id",
        "data",
        captions="text",
    )
    check_error(
        "the column image_id of .* holds int64, so it cannot be the captions; set the source's `captions` to one of "
        "file_name, Caption",
        "table",
        captions="image_id",
    )
    check_error(
        "tars has no column png for the image; set the source's `image` to one of __key__, jpg, json, json.captions",
        "tars",
        image="png",
    )
    check_error(
        "data has no split test; map train and val in `splits` to some of train, validation",
        "data",
        splits={"val": "test"},
    )
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    check_error(r"empty: it has 1 \.md, but must have .* images with a \.txt of the same name", "empty")
    check_error(
        r"cannot read .*nowhere \(neither a local path nor a readable hub dataset\), correct its path, name or",
        "nowhere",
    )
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    check_error(r"cannot read .*broken.parquet \(local, format .parquet\), correct its path or files", "broken.parquet")


def test_the_id_of_an_image_without_id_never_changes() -> None:
    """The split and the lists of exclusions depend on it."""
    columns = Columns.choose({"image": [], "caption": []}, {"image": None, "captions": None, "id": None}, Path("/"), "")
    rows = {"image": [b"an image", {"bytes": None, "path": "a.png"}, None], "caption": ["x", "y", "z"]}
    assert columns.records(rows)["id"] == ["577a303be60fb016", "f312fd6dc8c1eb8f", "2d06800538d394c2"]
