"""Exclusion lists are tab-separated files, and the records on them are rejected."""

from pathlib import Path

import pytest
from forms import image_folder, squares

from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.filters.exclusions import Excluded, Exclusion, write_exclusions
from lightning_dalle.data.sources.captioned import CaptionedImages
from lightning_dalle.errors import UserError


@pytest.fixture
def exclusion_list(tmp_path: Path) -> Path:
    file = tmp_path / "excluded.tsv"
    write_exclusions(
        file, [Exclusion("101", "near-duplicate of val", "7.jpg", 0.25), Exclusion('a\t"b"', "by hand", "", 0.0)]
    )
    return file


def test_the_list_has_a_header_and_a_line_per_record(exclusion_list: Path) -> None:
    head, first, *_ = exclusion_list.read_text().splitlines()
    assert head.split("\t") == ["id", "reason", "match", "distance"]
    assert first.split("\t") == ["101", "near-duplicate of val", "7.jpg", "0.2500"]


def test_records_on_the_list_are_rejected_with_ids_of_any_form(exclusion_list: Path) -> None:
    excluded = Excluded(file=exclusion_list)
    assert [excluded.rejects_record({"id": id}) for id in ("101", 'a\t"b"', "1010", "id")] == [True, True, False, False]


def test_a_filter_differs_after_its_list_changed(exclusion_list: Path) -> None:
    before = Excluded(file=exclusion_list)
    exclusion_list.write_text("id\n102\n")
    assert before != Excluded(file=exclusion_list)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_datamodule_leaves_out_records_on_the_list(exclusion_list: Path, tmp_path: Path, streamed: bool) -> None:
    image_folder(tmp_path / "data", {"train": squares(4), "validation": squares(2, first=4)})
    data = CaptionedImageDataModule(
        CaptionedImages(path=str(tmp_path / "data"), streaming=streamed),
        image_size=8, batch_size=3, text_len=8, vocab_size=300, filters=[Excluded(file=exclusion_list)], epoch_length=3,
    )  # fmt: skip
    data.setup("fit")
    [batch] = data.train_dataloader()
    assert sorted(batch.ids) == ["100", "102", "103"]


def test_a_missing_or_malformed_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the exclusion list .*none.tsv \(FileNotFoundError"):
        Excluded(file=tmp_path / "none.tsv")
    (tmp_path / "other.tsv").write_text("name\n101\n")
    with pytest.raises(
        UserError, match=r"other.tsv \(KeyError.*tab-separated columns, one of them id, such as `data overlap`"
    ):
        Excluded(file=tmp_path / "other.tsv")


def test_records_without_an_id_are_refused(exclusion_list: Path) -> None:
    with pytest.raises(
        UserError, match=r"needs records with an id, but .* has only the columns image, captions; remove the filter"
    ):
        Excluded(file=exclusion_list).rejects_record({"image": None, "captions": ["a cat"]})
