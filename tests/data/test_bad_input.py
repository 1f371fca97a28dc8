"""A thousand bad records of every kind through the datamodule: nothing crashes, and each is kept or counted."""

from collections import Counter
from pathlib import Path

import pytest
from bad_input import IN_JSON, IN_TEXT, PICTURES, BadRecord, bad_records, write_pairs, write_tars
from datasets import Dataset

from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.sources.captioned import CaptionedPictures
from lightning_dalle.tokenizer import CaptionTokenizer


def outcome(folder: Path, streamed: bool, tokenizer: Path) -> Counter[str | None]:
    """By reason how many were rejected, and under None how many came in a batch, read by two workers."""
    data = CaptionedImageDataModule(
        CaptionedPictures(path=str(folder), splits={"val": "train"}, streamed=streamed),
        image_size=16, batch_size=16, text_len=8, vocab_size=256, num_workers=2, tokenizer_file=tokenizer,
    )  # fmt: skip
    data.prepare_data()
    data.setup("validate")
    assert data.split("val") is not None
    assert isinstance(data.split("val"), Dataset) != streamed
    counts: Counter[str | None] = Counter(data.rejected.get("val", {}))
    for batch in data.val_dataloader():
        assert batch.images.shape[1:] == (3, 16, 16)
        counts[None] += len(batch.ids)
        counts.update(batch.rejected)
    return counts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(CaptionTokenizer.train(["a cat"], vocab_size=256, text_len=8).to_json())
    return path


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("form", ["pairs", "tars"])
def test_of_a_thousand_bad_records_each_is_kept_or_counted(
    form: str, streamed: bool, tokenizer: Path, tmp_path: Path
) -> None:
    kinds: tuple[BadRecord, ...] = PICTURES + (IN_TEXT if form == "pairs" else IN_JSON)
    records = bad_records(kinds, 1000)
    if form == "pairs":
        write_pairs(tmp_path / "bad", records)
    else:
        write_tars(tmp_path / "bad", records, shards=4)
    counts = outcome(tmp_path / "bad", streamed, tokenizer)
    assert counts.total() == 1000
    assert counts == Counter(record.reason for record in records)
