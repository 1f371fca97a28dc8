"""Filters on records and whole splits: what is kept, and what is counted by which reason."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as EncodedImage
from PIL import Image

from lightning_dalle.data.filters.pipeline import FilterPipeline, Rejection, record_name
from lightning_dalle.data.filters.rules import AspectRatio, DuplicateCaptions, TooShort


def encoded(width: int = 12, height: int = 8) -> dict[str, Any]:
    file = io.BytesIO()
    Image.effect_noise((width, height), 80).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def truncated() -> dict[str, Any]:
    whole = encoded(64, 64)
    return {**whole, "bytes": whole["bytes"][:2000]}


@dataclass(frozen=True)
class Odd:
    reason: ClassVar[str] = "odd id"

    def rejects_record(self, record: dict[str, Any]) -> bool:
        return int(record["id"]) % 2 == 1


FEATURES = Features(image=EncodedImage(decode=False), captions=List(Value("string")), id=Value("string"))
FILTERS = (TooShort(min_words=3, min_characters=1), AspectRatio(), Odd())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"captions": []}, "missing caption"),
        ({"captions": None}, "missing caption"),
        ({"captions": ["a b", "c d"]}, "caption too short"),
        ({"captions": ["a b c" * 1000]}, "caption too long"),
        ({"image": None}, "missing image"),
        ({"image": {"bytes": b"", "path": None}}, "empty image file"),
        ({"image": {"bytes": b"not an image", "path": None}}, "unreadable image"),
        ({"image": encoded(25, 12)}, "aspect ratio"),
        ({"id": "1"}, "odd id"),
        ({"captions": ["a b"], "image": None, "id": "1"}, "caption too short"),
    ],
)
def test_a_record_is_rejected_for_the_first_reason_that_applies(change: dict[str, Any], reason: str) -> None:
    record = {"image": encoded(), "captions": ["a red fox"], "id": "0"}
    assert FilterPipeline(FILTERS).check({**record, **change}) == Rejection(reason)


def test_captions_are_filtered_one_by_one() -> None:
    record = {"image": encoded(), "captions": ["a fox", " a red\tfox ", None], "id": "0"}
    assert FilterPipeline(FILTERS).check(record) == {**record, "captions": ["a red fox"]}


def rows(records: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list([{"id": str(2 * i), **record} for i, record in enumerate(records)], features=FEATURES)


def test_a_split_keeps_records_that_pass_and_counts_the_others() -> None:
    split = rows(
        [
            {"image": encoded(), "captions": ["a red fox", "a fox"]},
            {"image": truncated(), "captions": ["a red fox"]},
            {"image": encoded(), "captions": ["a fox"]},
            {"image": encoded(), "captions": ["a brown bear"]},
        ]
    )
    kept, rejected, examples = FilterPipeline(FILTERS).filter_rows(split)
    assert kept["captions"][:] == [["a red fox"], ["a brown bear"]]
    assert kept["id"][:] == ["0", "6"]
    assert kept.features == split.features
    assert rejected == {"unreadable image": 1, "caption too short": 1}
    assert examples == {"unreadable image": "2", "caption too short": "4"}


def test_a_rejected_record_is_named_by_its_file_or_id_or_index() -> None:
    lost = {"image": {"bytes": None, "path": "lost.jpg"}, "captions": ["a fox"], "id": "7"}
    assert record_name(lost, 3) == "lost.jpg"
    assert record_name({**lost, "image": None}, 3) == "7"
    assert record_name({"image": encoded(), "captions": []}, 3) == "3"


def test_all_records_with_a_frequent_caption_are_rejected() -> None:
    split = rows(
        [{"image": encoded(), "captions": [text, "An owl"]} for text in ("A fox", "a fox ", "a fox", "a bear")]
    )
    kept, rejected, _ = FilterPipeline((DuplicateCaptions(max_count=2),)).filter_rows(split)
    assert kept["captions"][:] == [["a bear"]]
    assert rejected == {"duplicate caption": 3}
    assert len(FilterPipeline((DuplicateCaptions(max_count=4),)).filter_rows(split)[0]) == 4


def test_decisions_are_cached_by_rows_and_filters(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows([{"image": encoded(), "captions": ["a red fox"]}]).save_to_disk(tmp_path / "split")
    FilterPipeline(FILTERS).filter_rows(Dataset.load_from_disk(tmp_path / "split"))

    def check(*_: Any, **__: Any) -> Any:
        raise AssertionError("filtered again")

    monkeypatch.setattr(FilterPipeline, "check", check)
    kept, rejected, _ = FilterPipeline(FILTERS).filter_rows(Dataset.load_from_disk(tmp_path / "split"))
    assert (len(kept), rejected) == (1, {})
    with pytest.raises(AssertionError, match="filtered again"):
        FilterPipeline(FILTERS[:1]).filter_rows(Dataset.load_from_disk(tmp_path / "split"))


def rows_on_disk(folder: Path, images: list[dict[str, Any]]) -> Dataset:
    """Return rows whose images are files or URLs, cached on disk as sources cache them."""
    records = [{"image": image, "captions": ["a red fox"], "id": str(i)} for i, image in enumerate(images)]
    options = {"gen_kwargs": {"records": records}, "features": FEATURES, "cache_dir": str(folder)}
    return Dataset.from_generator(iter_of, **options)


def iter_of(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from records


def test_a_new_or_changed_image_file_is_checked_again(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    reasons = []
    for content in (None, truncated()["bytes"], encoded()["bytes"]):
        if content is not None:
            path.write_bytes(content)
        split = rows_on_disk(tmp_path, [{"bytes": None, "path": str(path)}])
        reasons.append(dict(FilterPipeline().filter_rows(split)[1]))
    assert reasons == [{"missing image": 1}, {"unreadable image": 1}, {}]


def test_an_unreachable_image_is_requested_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(), {"bytes": None, "path": "https://host/image.png"}]

    def failing(*_: Any) -> Any:
        raise OSError("timed out")

    monkeypatch.setattr(fsspec, "open", failing)
    kept, rejected, _ = FilterPipeline().filter_rows(rows_on_disk(tmp_path, images))
    assert (kept["id"][:], rejected) == (["0"], {"unreachable image": 1})
    monkeypatch.setattr(fsspec, "open", lambda *_: io.BytesIO(images[0]["bytes"]))
    kept, rejected, _ = FilterPipeline().filter_rows(rows_on_disk(tmp_path, images))
    assert (kept["id"][:], kept["captions"][:], rejected) == (["0", "1"], [["a red fox"]] * 2, {})


def test_the_cache_depends_on_the_content_of_a_caption_counts_file(tmp_path: Path) -> None:
    captions = ["a red cat"] * 3 + ["a blue dog"]
    rows([{"image": encoded(), "captions": [text]} for text in captions]).save_to_disk(tmp_path / "split")
    file, kept = tmp_path / "caption_counts.json", []
    for counts in ({"a red cat": 3}, {}):
        file.write_text(json.dumps({"more_than": 2, "captions": counts}))
        split = Dataset.load_from_disk(tmp_path / "split")
        passed, _, _ = FilterPipeline([DuplicateCaptions(max_count=2, file=file)]).filter_rows(split)
        kept.append(len(passed))
    assert kept == [1, 4]
