"""The datamodule reads a thousand bad records of every kind: each is kept, or rejected and counted."""

from collections import Counter
from pathlib import Path

import pytest
from bad_input import BAD_IMAGES, CAPTION_FILES, JSON_CAPTIONS, BadRecord, bad_records, write_pairs, write_tars
from datasets import Dataset

from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.sources.captioned import CaptionedImages
from lightning_dalle.tokenizer import CaptionTokenizer


def count_outcomes(folder: Path, streaming: bool, tokenizer: Path) -> Counter[str | None]:
    """Return the number of rejected records by reason, and of records in batches under None, with two workers."""
    data = CaptionedImageDataModule(
        CaptionedImages(path=str(folder), splits={"val": "train"}, streaming=streaming),
        image_size=16, batch_size=16, text_len=8, vocab_size=256, num_workers=2, tokenizer_file=tokenizer,
    )  # fmt: skip
    data.prepare_data()
    data.setup("validate")
    assert data.split("val") is not None
    assert isinstance(data.split("val"), Dataset) != streaming
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


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("format", ["pairs", "tars"])
def test_each_of_a_thousand_bad_records_is_kept_or_counted(
    format: str, streaming: bool, tokenizer: Path, tmp_path: Path
) -> None:
    kinds: tuple[BadRecord, ...] = BAD_IMAGES + (CAPTION_FILES if format == "pairs" else JSON_CAPTIONS)
    records = bad_records(kinds, 1000)
    if format == "pairs":
        write_pairs(tmp_path / "bad", records)
    else:
        write_tars(tmp_path / "bad", records, shards=4)
    counts = count_outcomes(tmp_path / "bad", streaming, tokenizer)
    assert counts.total() == 1000
    assert counts == Counter(record.reason for record in records)
