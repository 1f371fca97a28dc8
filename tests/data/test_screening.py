"""Filters applied to records and to whole splits; every rejection is counted once."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as EncodedImage
from PIL import Image

from lightning_dalle.data.filters import AspectRatio, CaptionFlood, TooShort
from lightning_dalle.data.screening import Rejection, Screening


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
    features = Features(image=EncodedImage(decode=False), captions=List(Value("string")), id=Value("string"))
    return Dataset.from_list([{"id": str(2 * i), **record} for i, record in enumerate(records)], features=features)


def test_a_split_keeps_what_passes_and_counts_the_rest() -> None:
    split = rows(
        [
            {"image": encoded(), "captions": ["a red fox", "a fox"]},
            {"image": truncated(), "captions": ["a red fox"]},
            {"image": encoded(), "captions": ["a fox"]},
            {"image": encoded(), "captions": ["a brown bear"]},
        ]
    )
    kept, rejected = Screening(FILTERS).screen_rows(split)
    assert kept["captions"][:] == [["a red fox"], ["a brown bear"]]
    assert kept["id"][:] == ["0", "6"]
    assert kept.features == split.features
    assert rejected == {"unreadable picture": 1, "caption too short": 1}


def test_a_flood_is_told_by_the_split_and_goes_as_a_whole() -> None:
    split = rows(
        [{"image": encoded(), "captions": [text, "An owl"]} for text in ("A fox", "a fox ", "a fox", "a bear")]
    )
    kept, rejected = Screening((CaptionFlood(max_count=2),)).screen_rows(split)
    assert kept["captions"][:] == [["a bear"]]
    assert rejected == {"caption flood": 3}
    assert len(Screening((CaptionFlood(max_count=4),)).screen_rows(split)[0]) == 4


def test_verdicts_are_cached_by_rows_and_filters(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows([{"image": encoded(), "captions": ["a red fox"]}]).save_to_disk(tmp_path / "split")
    Screening(FILTERS).screen_rows(Dataset.load_from_disk(tmp_path / "split"))

    def verdict(*_: Any, **__: Any) -> Any:
        raise AssertionError("screened again")

    monkeypatch.setattr(Screening, "screen", verdict)
    kept, rejected = Screening(FILTERS).screen_rows(Dataset.load_from_disk(tmp_path / "split"))
    assert (len(kept), rejected) == (1, {})
    with pytest.raises(AssertionError, match="screened again"):
        Screening(FILTERS[:1]).screen_rows(Dataset.load_from_disk(tmp_path / "split"))


def test_a_flood_is_told_by_what_its_file_says_not_by_its_name(tmp_path: Path) -> None:
    """A file whose counts change gives other verdicts, whatever was cached."""
    captions = ["a red cat"] * 3 + ["a blue dog"]
    rows([{"image": encoded(), "captions": [text]} for text in captions]).save_to_disk(tmp_path / "split")
    file, kept = tmp_path / "floods.json", []
    for counts in ({"a red cat": 3}, {}):
        file.write_text(json.dumps({"more_than": 2, "captions": counts}))
        split = Dataset.load_from_disk(tmp_path / "split")
        screened, _ = Screening([CaptionFlood(max_count=2, file=file)]).screen_rows(split)
        kept.append(len(screened))
    assert kept == [1, 4]
