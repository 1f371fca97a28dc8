"""Exact resume: a run sees every record once per epoch, and a resumed run the records of an unbroken one."""

import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from datasets import Dataset, DatasetDict, IterableDatasetDict, concatenate_datasets
from forms import FORMATS, Photo, parquet_of_bytes, squares, tars
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_dalle.data.datamodule import Batch, CaptionedImageDataModule
from lightning_dalle.data.sources.captioned import CaptionedImages
from lightning_dalle.data.sources.columns import RECORD
from lightning_dalle.data.sources.mixture import Mixture
from lightning_dalle.data.sources.source import Source
from lightning_dalle.errors import UserError

TRAIN = 50
SPLITS = {"train": squares(TRAIN), "val": squares(23, first=TRAIN)}


def opened(path: Path, streamed: bool) -> CaptionedImages:
    return CaptionedImages(path=str(path), streaming=streamed)


def mixed(root: Path, streamed: bool) -> Mixture:
    tars(root / "a", {"train": SPLITS["train"][:10], "val": SPLITS["val"][:3]})
    parquet_of_bytes(root / "b", {"train": SPLITS["train"][10:], "val": SPLITS["val"][3:]})
    return Mixture(sources=[opened(root / "a", streamed), opened(root / "b", streamed)], weights=[1.0, 2.0])


def datamodule(source: Source, rank: int = 0, world_size: int = 1, **options: Any) -> CaptionedImageDataModule:
    values = {"image_size": 8, "batch_size": 4, "text_len": 4, "vocab_size": 260, "shuffle_buffer": 7, **options}
    data = CaptionedImageDataModule(source, **values)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    data.setup("fit")
    return data


def ids(loader: Any, count: int | None = None) -> list[str]:
    return [id for batch in itertools.islice(loader, count) for id in batch.ids]


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "streamed"])
def test_two_ranks_by_two_workers_see_every_record_once_per_epoch(streamed: bool, tmp_path: Path) -> None:
    parquet_of_bytes(tmp_path, SPLITS)
    ranks = [
        datamodule(opened(tmp_path, streamed), rank, 2, num_workers=2, batch_size=1, epoch_length=TRAIN)
        for rank in (0, 1)
    ]
    for photos, loaders in (
        (SPLITS["val"], [data.val_dataloader() for data in ranks]),
        (SPLITS["train"], [data.predict_dataloader() for data in ranks]),
    ):
        seen = [id for loader in loaders for id in ids(loader)]
        assert Counter(seen) == Counter(photo.id for photo in photos)


class FourShards:
    """Source of 48 streamed records in four equal shards."""

    def load(self, image_size: int) -> IterableDatasetDict:
        return IterableDatasetDict({"train": self.rows(48).to_iterable_dataset(4)})

    @staticmethod
    def rows(count: int) -> Dataset:
        rows = [
            {"image": {"bytes": photo.content, "path": None}, "captions": photo.captions, "id": photo.id}
            for photo in SPLITS["train"][:count]
        ]
        return Dataset.from_list(rows, features=RECORD)


def test_two_ranks_by_two_workers_train_on_every_record_once_per_epoch() -> None:
    ranks = [datamodule(FourShards(), rank, 2, num_workers=2, epoch_length=48) for rank in (0, 1)]
    loaders = [data.train_dataloader() for data in ranks]
    assert [len(loader) for loader in loaders] == [6, 6]
    epochs = [[id for loader in loaders for id in ids(loader)] for _ in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(photo.id for photo in SPLITS["train"][:48])
    assert epochs[0] != epochs[1] != epochs[2]


def test_an_epoch_shorter_than_a_pass_continues_the_previous_epoch() -> None:
    loader = datamodule(FourShards(), batch_size=5, epoch_length=20).train_dataloader()
    seen = [id for _ in range(12) for id in ids(loader)]
    for start in range(0, 240, 48):
        assert len(set(seen[start : start + 48])) == 48


@dataclass(frozen=True)
class WithRejects:
    """Source of streamed photos, the first `rejects` of which have no caption."""

    photos: list[Photo]
    rejects: int

    def load(self, image_size: int) -> IterableDatasetDict:
        rows = [
            {
                "image": {"bytes": photo.content, "path": None},
                "captions": photo.captions[: i >= self.rejects],
                "id": photo.id,
            }
            for i, photo in enumerate(self.photos)
        ]
        return IterableDatasetDict({"train": Dataset.from_list(rows, features=RECORD).to_iterable_dataset(1)})


def test_rejected_records_do_not_end_later_passes() -> None:
    loader = datamodule(WithRejects(SPLITS["train"][:6], 2), batch_size=1, epoch_length=3).train_dataloader()
    seen = Counter(id for _ in range(40) for id in ids(loader))
    assert seen == dict.fromkeys(("102", "103", "104", "105"), 30)


def test_a_small_source_of_a_mixture_is_read_more_often_than_a_large_one() -> None:
    small, large = WithRejects(SPLITS["train"][:4], 1), WithRejects(SPLITS["train"][4:], 5)
    mixture = Mixture(sources=[small, large], weights=[1.0, 1.0])
    loader = datamodule(mixture, epoch_length=40).train_dataloader()
    seen = Counter(id for _ in range(10) for id in ids(loader))
    assert set(seen) == {str(id) for id in range(101, 150)} - {str(id) for id in range(104, 109)}
    none = Mixture(sources=[small, WithRejects(SPLITS["train"][4:8], 4)], weights=[9.0, 1.0])
    loader = datamodule(none, epoch_length=4).train_dataloader()
    with pytest.raises(UserError, match=r"all records .* were rejected: \d+ missing caption; loosen data.filters"):
        [ids(loader) for _ in range(100)]


class RecordIds(pl.LightningModule):
    """Model that trains nothing and lists the ids of the records it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), list[str]()

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen += batch.ids
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class SixteenRows:
    """Source of 16 rows, four batches of four."""

    def load(self, image_size: int) -> DatasetDict:
        return DatasetDict({"train": FourShards.rows(16)})


def test_a_fit_on_rows_resumes_exactly_from_every_step(tmp_path: Path) -> None:
    def fit(steps: int, path: Path | None = None) -> list[str]:
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", callbacks=save, logger=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        model = RecordIds()
        data = CaptionedImageDataModule(SixteenRows(), image_size=8, batch_size=4, text_len=4, vocab_size=260)
        trainer.fit(model, data, ckpt_path=path)
        return model.seen

    unbroken = fit(11)
    assert unbroken[:16] != unbroken[16:32]
    for stop in range(1, 10):
        assert fit(stop + 2, tmp_path / f"step={stop}.ckpt") == unbroken[4 * stop : 4 * stop + 8]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fit_on_a_stream_resumes_exactly_from_every_step(workers: int, tmp_path: Path) -> None:
    def fit(steps: int, path: Path | None = None) -> list[str]:
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = pl.Trainer(
            max_steps=steps, accelerator="cpu", callbacks=save, logger=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        model = RecordIds()
        data = CaptionedImageDataModule(
            FourShards(), image_size=8, batch_size=4, text_len=4, vocab_size=260, num_workers=workers, epoch_length=18,
            shuffle_buffer=7,
        )  # fmt: skip
        trainer.fit(model, data, ckpt_path=path)
        return model.seen

    unbroken = fit(11)  # epochs of 4 steps
    assert len(set(unbroken)) == 44
    for stop in (2, 4, 7) if workers else range(1, 10):
        assert fit(stop + 2, tmp_path / f"step={stop}.ckpt") == unbroken[4 * stop : 4 * stop + 8]


class UnequalShards:
    """Source of two shards; most records of the first are rejected, so the ranks reach different positions."""

    def load(self, image_size: int) -> IterableDatasetDict:
        rows = WithRejects(SPLITS["train"][:24], 9).load(image_size)["train"]
        return IterableDatasetDict({"train": concatenate_datasets([rows.take(12), rows.skip(12)])})


def fit_in_two(folder: Path, steps: int, path: Path | None = None) -> list[list[str]]:
    """Train on two ranks and return the ids that each saw."""
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=2, strategy="ddp_fork", callbacks=[save, WriteIds(folder)],
        logger=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = CaptionedImageDataModule(
        UnequalShards(), image_size=8, batch_size=2, text_len=4, vocab_size=260, epoch_length=16, shuffle_buffer=3
    )
    trainer.fit(RecordIds(), data, ckpt_path=path)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


class WriteIds(pl.Callback):
    """Callback that writes the ids that a rank saw to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, RecordIds)
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(pl_module.seen))


def test_each_of_two_ranks_resumes_at_its_own_position(tmp_path: Path) -> None:
    unbroken = fit_in_two(tmp_path, 9)  # epochs of 4 steps
    states = torch.load(tmp_path / "step=6.ckpt")["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["ranks"]
    assert len(states) == 2
    assert states[0] != states[1]
    for stop in (3, 4, 6):
        resumed = fit_in_two(tmp_path, stop + 3, tmp_path / f"step={stop}.ckpt")
        assert resumed == [seen[2 * stop : 2 * stop + 6] for seen in unbroken]


def test_a_stream_is_not_resumed_with_another_number_of_processes_or_workers() -> None:
    loader: Any = datamodule(FourShards()).train_dataloader()
    state = loader.state_dict()
    message = "written by {} processes with {} workers, but this run has 1 with 1; use as many"
    with pytest.raises(UserError, match=message.format(2, 1)):
        loader.load_state_dict({**state, "ranks": [[None], [None]]})
    with pytest.raises(UserError, match=message.format(1, 2)):
        loader.load_state_dict({**state, "ranks": [[None, None]]})


def test_the_state_of_an_earlier_version_is_refused() -> None:
    loader: Any = datamodule(SixteenRows()).train_dataloader()
    with pytest.raises(UserError, match="cannot resume the data: the checkpoint is of an earlier version; start a new"):
        loader.load_state_dict({"_snapshot": {}})


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "streamed"])
@pytest.mark.parametrize("form", [*FORMATS, "mixture"])
def test_a_resumed_run_sees_the_records_of_an_unbroken_run(form: str, streamed: bool, tmp_path: Path) -> None:
    if form == "mixture":
        source: Source = mixed(tmp_path, streamed)
    else:
        FORMATS[form](tmp_path / "data", SPLITS)
        source = opened(tmp_path / "data", streamed)
    workers = 2 if form in ("tars", "mixture") else 0
    data = datamodule(source, num_workers=workers, epoch_length=TRAIN)
    steps = len(data.train_dataloader())
    loader = data.train_dataloader()
    stop = random.Random(form).randrange(1, steps)
    before = ids(loader, stop)
    state = loader.state_dict()  # type: ignore[attr-defined]
    unbroken = ids(data.train_dataloader())
    assert before == unbroken[: len(before)]
    resumed = datamodule(source, num_workers=workers, epoch_length=TRAIN).train_dataloader()
    resumed.load_state_dict(state)  # type: ignore[attr-defined]
    assert before + ids(resumed) == unbroken
    assert len(set(unbroken)) > len(unbroken) / 2
