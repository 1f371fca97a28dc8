"""Objects of `datasets` as data, folders of `save_to_disk`, and configurations and revisions of the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from forms import dataset, pairs, squares
from PIL import Image

from lightning_dalle.data.images.decoding import decode_pil
from lightning_dalle.data.sources import formats
from lightning_dalle.data.sources.captioned import CaptionedImages
from lightning_dalle.data.sources.source import source_name
from lightning_dalle.errors import UserError


def ids(splits: Any) -> dict[str, list[str]]:
    return {name: [row["id"] for row in rows] for name, rows in splits.items()}


PARTS = DatasetDict({"train": dataset(squares(4)), "dev": dataset(squares(2, first=4))})
BY_NAME = {"splits": {"train": "train", "val": "dev"}}


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_dict_is_read_like_its_file(streaming: bool) -> None:
    splits = CaptionedImages(path=PARTS, streaming=streaming, **BY_NAME).load(8)  # type: ignore[arg-type]
    assert isinstance(splits, IterableDatasetDict if streaming else DatasetDict)
    assert ids(splits) == {"train": ["100", "101", "102", "103"], "val": ["104", "105"]}
    row = next(iter(splits["val"]))
    assert row["captions"] == ["square 4", "a square of 4"]
    assert (decode_pil(row["image"]) if streaming else row["image"]).getpixel((0, 0)) == (4, 0, 0)


def test_an_iterable_dataset_dict_is_streamed() -> None:
    streams = IterableDatasetDict({name: rows.to_iterable_dataset(2) for name, rows in PARTS.items()})
    splits = CaptionedImages(path=streams, **BY_NAME).load(8)  # type: ignore[arg-type]
    assert isinstance(splits, IterableDatasetDict)
    assert splits["train"].num_shards == 2
    assert ids(splits) == {"train": ["100", "101", "102", "103"], "val": ["104", "105"]}


@pytest.mark.parametrize("kind", ["rows", "shuffled", "streaming", "stream", "saved"])
def test_a_single_dataset_gets_its_val_split_by_a_hash_of_the_id(kind: str, tmp_path: Path) -> None:
    rows = dataset(squares(100)).shuffle(seed=1) if kind == "shuffled" else dataset(squares(100))
    if kind == "saved":
        rows.save_to_disk(tmp_path)
    path = {"saved": str(tmp_path), "stream": rows.to_iterable_dataset(3)}.get(kind, rows)
    splits = CaptionedImages(path=path, streaming=kind == "streaming").load(8)
    assert isinstance(splits["train"], IterableDataset) == (kind in ("stream", "streaming"))
    found = ids(splits)
    assert set(found["val"]) == {"140", "154", "155", "170", "189"}
    assert sorted(found["train"] + found["val"]) == [str(100 + i) for i in range(100)]
    assert next(iter(splits["val"]))["captions"][0] == f"square {int(found['val'][0]) - 100}"


def test_columns_of_an_object_are_chosen_and_cleaned_and_its_format_is_ignored() -> None:
    rows = dataset(squares(3)).rename_columns({"image_id": "id", "image": "pixels"})
    rows = rows.add_column("alt", ["one\ntwo", " ", "three"]).with_format("numpy")
    splits = CaptionedImages(path=rows, image="pixels", captions="alt", splits={"train": "train"}).load(8)
    assert splits["train"]["captions"][:] == [["one", "two"], [], ["three"]]
    records = CaptionedImages(path=PARTS["train"], splits={"train": "train"}).load(8)["train"]
    spaced = records.map(lambda row: {"captions": [" spaced  out ", ""]}, features=records.features)
    assert CaptionedImages(path=spaced).load(8)["val"]["captions"][:] == [["spaced out"]]
    with pytest.raises(UserError, match=r"^Dataset \w+ has no column nothing for the captions; set the source's"):
        CaptionedImages(path=spaced, captions="nothing").load(8)


def photos() -> Iterator[dict[str, Any]]:
    for i in range(7):
        yield {"image": Image.new("RGB", (8, 8), (i, 0, 0)), "text": f"photo {i}", "id": i}


def test_the_columns_of_a_stream_without_features_are_those_of_its_first_rows() -> None:
    stream = IterableDataset.from_generator(photos)
    assert stream.features is None
    splits = CaptionedImages(path=stream, splits={"train": "train"}).load(8)
    rows = list(splits["train"])
    assert [(row["id"], row["captions"]) for row in rows] == [(str(i), [f"photo {i}"]) for i in range(7)]
    assert [decode_pil(row["image"]).getpixel((0, 0))[0] for row in rows] == list(range(7))  # type: ignore[index]
    with pytest.raises(UserError, match=r"IterableDataset has no column captions .* one of id, image, words"):
        CaptionedImages(path=stream.rename_column("text", "words")).load(8)


def test_a_split_without_records_is_refused() -> None:
    with pytest.raises(UserError, match=r"a split of Dataset .* has no records; name others in `splits`"):
        CaptionedImages(path=PARTS["train"].select([])).load(8)


def test_results_name_an_object_by_its_class_and_fingerprint() -> None:
    rows = PARTS["train"]
    source = CaptionedImages(path=rows, captions="captions")
    assert source_name(source) == f"Dataset {rows._fingerprint}"
    assert repr(source) == (
        f"CaptionedImages(path='Dataset {rows._fingerprint}', name=None, revision=None, image=None, "
        "captions='captions', id=None, splits=None, streaming=False)"
    )
    assert source_name(CaptionedImages(path=PARTS)) == " ".join(
        ["DatasetDict", *(rows._fingerprint for rows in PARTS.values())]
    )
    assert source_name(CaptionedImages(path=rows.to_iterable_dataset())) == "IterableDataset"
    assert source_name(CaptionedImages(path="my/images")) == "my/images"


def test_without_a_fingerprint_an_object_is_named_by_its_number_of_rows() -> None:
    rows = Dataset.from_dict({"image": [None] * 5})
    del rows._fingerprint  # private, so a later version of `datasets` may lack it
    assert source_name(CaptionedImages(path=rows)) == "Dataset 5"


def test_name_and_revision_reach_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Builder:
        name = "parquet"

    def load_dataset_builder(path: str, **options: Any) -> type[Builder]:
        calls.append((path, options))
        return Builder

    def load_dataset(path: str, **options: Any) -> DatasetDict:
        calls.append((path, options))
        return PARTS

    monkeypatch.setattr(formats, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(formats, "load_dataset", load_dataset)
    CaptionedImages(path="org/photos", name="large", revision="v2", **BY_NAME).load(8)  # type: ignore[arg-type]
    hub = {"name": "large", "revision": "v2"}
    assert calls == [("org/photos", hub), ("org/photos", {"streaming": False, **hub})]


def test_a_name_selects_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, count in (("small", 3), ("large", 5)):
        (tmp_path / size).mkdir()
        dataset(squares(count)).to_parquet(tmp_path / size / "train.parquet")
    configs = "".join(f"- config_name: {size}\n  data_files: {size}/*.parquet\n" for size in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.setattr(formats, "detect_format", lambda path: ("hub", None))  # a local repository of the hub

    def load(name: str | None) -> Any:
        return CaptionedImages(path=str(tmp_path), name=name, splits={"train": "train"}).load(8)

    assert len(load("large")["train"]) == 5
    with pytest.raises(UserError, match=r"correct its path, name or revision: .*'huge' not found.*'small', 'large'"):
        load("huge")
    with pytest.raises(UserError, match=r"Config name is missing.* available configs: \['small', 'large'\]"):
        load(None)


@pytest.mark.parametrize("option", ["name", "revision"])
def test_a_name_or_revision_of_local_data_is_refused(option: str, tmp_path: Path) -> None:
    pairs(tmp_path, {"train": squares(2)})
    for path, found in ((str(tmp_path), str(tmp_path)), (PARTS, "DatasetDict"), ("https://host/a.tar", "https://host")):
        with pytest.raises(UserError, match=rf"{found}.* is not on the hub, but .*{option}='main'.*; remove both"):
            CaptionedImages(path=path, **{option: "main"}).load(8)  # type: ignore[arg-type]
