"""The datamodule and its datasets under any LightningModule, Trainer flag and DataLoader."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from datasets import DatasetDict, IterableDatasetDict
from forms import dataset, squares
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_dalle.data.datamodule import Batch, CaptionedImageDataModule
from lightning_dalle.data.loading.samplers import SampleIndex
from lightning_dalle.data.sources.captioned import CaptionedImages


class AnyModel(pl.LightningModule):
    """Model of the mean color, which lists the ids of the records that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.color, self.trained, self.validated = torch.nn.Parameter(torch.zeros(3, 1, 1)), list[str](), list[str]()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.trained += batch.ids
        return (batch.images.float() - self.color).square().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += batch.ids

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


ROWS = DatasetDict({"train": dataset(squares(24)), "val": dataset(squares(8))})
STREAMS = IterableDatasetDict({name: rows.to_iterable_dataset(4) for name, rows in ROWS.items()})


def datamodule(path: Any, **options: Any) -> CaptionedImageDataModule:
    source = CaptionedImages(path=path, splits={"train": "train", "val": "val"})
    options = {"image_size": 8, "batch_size": 4, "text_len": 4, "vocab_size": 260, "epoch_length": 24, **options}
    return CaptionedImageDataModule(source, **options)


def fit(data: CaptionedImageDataModule, folder: Path, ckpt_path: Path | None = None, **flags: Any) -> AnyModel:
    """Train three epochs and save after every step; return the model."""
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=save, logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **flags,
    )  # fmt: skip
    model = AnyModel()
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model


def first(count: int) -> list[str]:
    return [str(100 + i) for i in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("amount", "num_records", "num_validated"), [(1, 4, 4), (0.5, 12, 4)])
def test_overfit_batches_repeats_the_first_batches(
    amount: float, num_records: int, num_validated: int, workers: int, tmp_path: Path
) -> None:
    model = fit(datamodule(ROWS, num_workers=workers), tmp_path, overfit_batches=amount)
    assert model.trained == 3 * first(num_records)
    assert model.validated == 3 * first(num_validated)
    last = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(last) == 3 * num_records // 4
    resumed = fit(datamodule(ROWS, num_workers=workers), tmp_path, last[-2], overfit_batches=amount)
    assert resumed.trained == model.trained[-4:]


@pytest.mark.parametrize("workers", [0, 2])
def test_overfit_batches_repeats_the_first_batches_of_a_stream(workers: int, tmp_path: Path) -> None:
    assert fit(datamodule(STREAMS, num_workers=workers), tmp_path, overfit_batches=1).trained == 3 * first(4)
    resumed = fit(datamodule(STREAMS, num_workers=workers), tmp_path, tmp_path / "step=1.ckpt", overfit_batches=1)
    assert resumed.trained == 2 * first(4)


@pytest.mark.parametrize("path", [ROWS, STREAMS], ids=["rows", "streamed"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("flags", "num_steps"),
    [
        ({"limit_train_batches": 4}, 12),
        ({"limit_train_batches": 0.7}, 12),
        ({"fast_dev_run": True}, 1),
        ({"fast_dev_run": 3}, 3),
    ],
    ids=str,
)
def test_limited_epochs_have_the_same_length(
    path: Any, workers: int, flags: dict[str, Any], num_steps: int, tmp_path: Path
) -> None:
    model = fit(datamodule(path, num_workers=workers, shuffle_buffer=5), tmp_path, **flags)
    assert len(model.trained) == 4 * num_steps
    assert set(model.trained) <= set(first(24))
    assert len(set(model.trained)) > 3


@pytest.mark.parametrize("path", [ROWS, STREAMS], ids=["rows", "streamed"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [1.0, 3], ids=str)
def test_a_fit_resumes_exactly_at_the_end_of_an_epoch_and_after_it(
    path: Any, workers: int, limit: float, tmp_path: Path
) -> None:
    """Workers have read ahead, and the positions of some are still those of the previous epoch."""
    options: dict[str, Any] = {"num_workers": workers, "shuffle_buffer": 5}
    unbroken = fit(datamodule(path, **options), tmp_path, limit_train_batches=limit).trained
    length = len(unbroken) // 12
    for stop in (length - 1, length, length + 1, 2 * length):
        data = datamodule(path, **options)
        resumed = fit(data, tmp_path / "resumed", tmp_path / f"step={stop}.ckpt", limit_train_batches=limit)
        assert resumed.trained == unbroken[4 * stop :]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loader_shuffles_the_dataset(workers: int) -> None:
    data = datamodule(ROWS)
    data.setup("fit")
    rows = data.dataset("train")
    loader = DataLoader(rows, batch_size=5, shuffle=True, num_workers=workers, collate_fn=rows.collate)
    batches = list(loader)
    seen = [id for batch in batches for id in batch.ids]
    assert sorted(seen) == first(24) != seen
    assert batches[0].images.shape == (5, 3, 8, 8)
    model = AnyModel()
    pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False).fit(model, loader)
    assert sorted(model.trained) == sorted(2 * first(24))


def test_a_row_number_is_the_record_in_epoch_0() -> None:
    data = datamodule(ROWS)
    data.setup("fit")
    rows = data.dataset("train", bpe_dropout=0.5)
    for number, example in enumerate(rows[i] for i in range(24)):
        assert example[1:] == rows[SampleIndex(0, number)][1:]
