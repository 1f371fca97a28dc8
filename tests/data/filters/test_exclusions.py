"""A list of exclusions is written as a table, and its records are not trained on."""

from pathlib import Path

import pytest
from forms import image_folder, squares

from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.filters.exclusions import Excluded, Exclusion, write_exclusions
from lightning_dalle.data.sources.captioned import CaptionedPictures
from lightning_dalle.errors import UserError


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "excluded.tsv"
    write_exclusions(
        file, [Exclusion("101", "near-duplicate of val", "7.jpg", 0.25), Exclusion('a\t"b"', "by hand", "", 0.0)]
    )
    return file


def test_the_list_is_a_table_for_people(table: Path) -> None:
    head, first, *_ = table.read_text().splitlines()
    assert head.split("\t") == ["id", "reason", "match", "distance"]
    assert first.split("\t") == ["101", "near-duplicate of val", "7.jpg", "0.2500"]


def test_records_on_the_list_are_rejected_whatever_their_ids_look_like(table: Path) -> None:
    excluded = Excluded(list=table)
    assert [excluded.rejects_record({"id": id}) for id in ("101", 'a\t"b"', "1010", "id")] == [True, True, False, False]


def test_a_list_that_changes_is_another_filter(table: Path) -> None:
    before = Excluded(list=table)
    table.write_text("id\n102\n")
    assert before != Excluded(list=table)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_datamodule_honours_the_list(table: Path, tmp_path: Path, streamed: bool) -> None:
    image_folder(tmp_path / "data", {"train": squares(4), "validation": squares(2, first=4)})
    data = CaptionedImageDataModule(
        CaptionedPictures(path=str(tmp_path / "data"), streamed=streamed),
        image_size=8, batch_size=3, text_len=8, vocab_size=300, filters=[Excluded(list=table)], epoch_length=3,
    )  # fmt: skip
    data.setup("fit")
    [batch] = data.train_dataloader()
    assert sorted(batch.ids) == ["100", "102", "103"]


def test_a_list_that_is_none_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the list of exclusions .*none.tsv cannot be read"):
        Excluded(list=tmp_path / "none.tsv")
    (tmp_path / "other.tsv").write_text("name\n101\n")
    with pytest.raises(UserError, match=r"a tab-separated column id, but .*other.tsv is not"):
        Excluded(list=tmp_path / "other.tsv")


def test_records_without_an_id_are_refused_in_a_sentence(table: Path) -> None:
    with pytest.raises(
        UserError, match="names records by their id, but those of this source have only image, captions"
    ):
        Excluded(list=table).rejects_record({"image": None, "captions": ["a cat"]})
