"""Filters applied to records and to whole splits; every rejection is counted once."""

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

from lightning_dalle.data.filters.pipeline import Rejection, Screening, name_of
from lightning_dalle.data.filters.rules import AspectRatio, CaptionFlood, TooShort


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
        ({"captions": []}, "without a caption"),
        ({"captions": None}, "without a caption"),
        ({"captions": ["a b", "c d"]}, "caption too short"),
        ({"captions": ["a b c" * 1000]}, "caption too long"),
        ({"image": None}, "without a picture"),
        ({"image": {"bytes": b"", "path": None}}, "zero bytes"),
        ({"image": {"bytes": b"no picture", "path": None}}, "unreadable picture"),
        ({"image": encoded(25, 12)}, "aspect ratio"),
        ({"id": "1"}, "odd id"),
        ({"captions": ["a b"], "image": None, "id": "1"}, "caption too short"),
    ],
)
def test_a_record_is_rejected_for_the_first_of_its_faults(change: dict[str, Any], reason: str) -> None:
    record = {"image": encoded(), "captions": ["a red fox"], "id": "0"}
    assert Screening(FILTERS).screen({**record, **change}) == Rejection(reason)


def test_captions_are_judged_one_by_one() -> None:
    record = {"image": encoded(), "captions": ["a fox", " a red\tfox ", None], "id": "0"}
    assert Screening(FILTERS).screen(record) == {**record, "captions": ["a red fox"]}


def rows(records: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list([{"id": str(2 * i), **record} for i, record in enumerate(records)], features=FEATURES)


def test_a_split_keeps_what_passes_and_counts_the_rest() -> None:
    split = rows(
        [
            {"image": encoded(), "captions": ["a red fox", "a fox"]},
            {"image": truncated(), "captions": ["a red fox"]},
            {"image": encoded(), "captions": ["a fox"]},
            {"image": encoded(), "captions": ["a brown bear"]},
        ]
    )
    kept, rejected, examples = Screening(FILTERS).screen_rows(split)
    assert kept["captions"][:] == [["a red fox"], ["a brown bear"]]
    assert kept["id"][:] == ["0", "6"]
    assert kept.features == split.features
    assert rejected == {"unreadable picture": 1, "caption too short": 1}
    assert examples == {"unreadable picture": "2", "caption too short": "4"}


def test_a_rejected_record_is_named_by_what_a_person_finds_it_by() -> None:
    lost = {"image": {"bytes": None, "path": "lost.jpg"}, "captions": ["a fox"], "id": "7"}
    assert name_of(lost, 3) == "lost.jpg"
    assert name_of({**lost, "image": None}, 3) == "7"
    assert name_of({"image": encoded(), "captions": []}, 3) == "3"


def test_a_flood_is_told_by_the_split_and_goes_as_a_whole() -> None:
    split = rows(
        [{"image": encoded(), "captions": [text, "An owl"]} for text in ("A fox", "a fox ", "a fox", "a bear")]
    )
    kept, rejected, _ = Screening((CaptionFlood(max_count=2),)).screen_rows(split)
    assert kept["captions"][:] == [["a bear"]]
    assert rejected == {"caption flood": 3}
    assert len(Screening((CaptionFlood(max_count=4),)).screen_rows(split)[0]) == 4


def test_verdicts_are_cached_by_rows_and_filters(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows([{"image": encoded(), "captions": ["a red fox"]}]).save_to_disk(tmp_path / "split")
    Screening(FILTERS).screen_rows(Dataset.load_from_disk(tmp_path / "split"))

    def verdict(*_: Any, **__: Any) -> Any:
        raise AssertionError("screened again")

    monkeypatch.setattr(Screening, "screen", verdict)
    kept, rejected, _ = Screening(FILTERS).screen_rows(Dataset.load_from_disk(tmp_path / "split"))
    assert (len(kept), rejected) == (1, {})
    with pytest.raises(AssertionError, match="screened again"):
        Screening(FILTERS[:1]).screen_rows(Dataset.load_from_disk(tmp_path / "split"))


def kept_on_disk(folder: Path, images: list[dict[str, Any]]) -> Dataset:
    """As sources keep them: the pictures are files or URLs of their own."""
    records = [{"image": image, "captions": ["a red fox"], "id": str(i)} for i, image in enumerate(images)]
    options = {"gen_kwargs": {"records": records}, "features": FEATURES, "cache_dir": str(folder)}
    return Dataset.from_generator(iter_of, **options)


def iter_of(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from records


def test_a_picture_that_came_or_changed_is_judged_anew(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    reasons = []
    for content in (None, truncated()["bytes"], encoded()["bytes"]):
        if content is not None:
            path.write_bytes(content)
        split = kept_on_disk(tmp_path, [{"bytes": None, "path": str(path)}])
        reasons.append(dict(Screening().screen_rows(split)[1]))
    assert reasons == [{"without a picture": 1}, {"unreadable picture": 1}, {}]


def test_a_network_that_failed_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(), {"bytes": None, "path": "https://host/picture.png"}]

    def failing(*_: Any) -> Any:
        raise OSError("timed out")

    monkeypatch.setattr(fsspec, "open", failing)
    kept, rejected, _ = Screening().screen_rows(kept_on_disk(tmp_path, images))
    assert (kept["id"][:], rejected) == (["0"], {"unreachable picture": 1})
    monkeypatch.setattr(fsspec, "open", lambda *_: io.BytesIO(images[0]["bytes"]))
    kept, rejected, _ = Screening().screen_rows(kept_on_disk(tmp_path, images))
    assert (kept["id"][:], kept["captions"][:], rejected) == (["0", "1"], [["a red fox"]] * 2, {})


def test_a_flood_is_told_by_what_its_file_says_not_by_its_name(tmp_path: Path) -> None:
    """A file whose counts change gives other verdicts, whatever was cached."""
    captions = ["a red cat"] * 3 + ["a blue dog"]
    rows([{"image": encoded(), "captions": [text]} for text in captions]).save_to_disk(tmp_path / "split")
    file, kept = tmp_path / "floods.json", []
    for counts in ({"a red cat": 3}, {}):
        file.write_text(json.dumps({"more_than": 2, "captions": counts}))
        split = Dataset.load_from_disk(tmp_path / "split")
        screened, _, _ = Screening([CaptionFlood(max_count=2, file=file)]).screen_rows(split)
        kept.append(len(screened))
    assert kept == [1, 4]
