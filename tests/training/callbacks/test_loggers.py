"""Scalars, images and histograms reach every logger that can take them, and the callbacks that monitor scalars."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_dalle.data.loading.examples import Batch
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.models.dvae import DVAEConfig
from lightning_dalle.training.callbacks.loggers import log_histogram, log_image, log_scalars, shows_images
from lightning_dalle.training.callbacks.reconstruction import ReconstructionEvaluation
from lightning_dalle.training.callbacks.visualization import Reconstructions
from lightning_dalle.training.lit_dvae import LitDVAE


class RecordingWandb(WandbLogger):
    """W&B logger that keeps what it is given instead of starting a run."""

    experiment = save_dir = name = version = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.images: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.images[key] = images

    def log_hyperparams(self, params: Any) -> None:
        pass

    def finalize(self, status: str) -> None:
        pass

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.update(metrics)


def trainer_with(*loggers: Any) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=loggers)


def test_tensorboard_and_wandb_get_images_and_histograms_and_csv_ignores_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=lambda np_histogram: np_histogram))
    board, table, wandb = TensorBoardLogger(tmp_path), CSVLogger(tmp_path), RecordingWandb()
    trainer, figure = trainer_with(board, table, wandb), Figure()
    figure.subplots().plot([1, 2])
    log_image(trainer, "image", Image.new("RGB", (4, 3), "red"), 7)
    log_image(trainer, "figure", figure, 7)
    log_histogram(trainer, "codes", torch.tensor([2, 0, 1]), 7)
    log_scalars(trainer, {"fid": 2.5}, 7)
    for logger in (board, table):
        logger.save()
    events = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["image", "figure"]
    assert events.Histograms("codes")[0].histogram_value.num == 3
    assert events.Scalars("fid")[0].value == 2.5
    assert list(wandb.images) == ["image", "figure"]
    counts, _ = wandb.metrics["codes"]
    assert np.array_equal(counts, [2, 0, 1])
    assert wandb.metrics["fid"] == 2.5
    rows = list(csv.DictReader(Path(table.log_dir, "metrics.csv").read_text().splitlines()))
    assert rows == [{"fid": "2.5", "step": "7"}]


@pytest.mark.parametrize(("loggers", "shown"), [([RecordingWandb()], True), ([CSVLogger("x")], False), ([], False)])
def test_images_are_drawn_only_for_loggers_that_take_them(
    loggers: list[Any], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shows_images(trainer_with(*loggers)) == shown
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    assert not shows_images(trainer_with(*loggers))


def test_checkpoints_and_early_stopping_monitor_figures_of_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also log dead codes; two loggers get both. The first FID is the best, so the run stops after three."""
    fids = iter([3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(ReconstructionEvaluation, "_run", lambda *arguments: {"p/fid": next(fids)})
    monkeypatch.setattr(ReconstructionEvaluation, "setup", lambda *arguments, **named: None)
    evaluation = ReconstructionEvaluation(Protocol(name="p"), every_n_validations=1)
    best = ModelCheckpoint(tmp_path, monitor="p/fid", save_top_k=1)
    batch = Batch(
        torch.full((2, 3, 32, 32), 9).byte(),
        torch.zeros(2, 4),
        torch.zeros(2, dtype=torch.bool),
        ["a", "b"],
        ["0", "1"],
    )
    loader = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    table, wandb = CSVLogger(tmp_path), RecordingWandb()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=9, logger=[table, wandb], enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Reconstructions(), evaluation, EarlyStopping("p/fid", patience=2), best], num_sanity_val_steps=0,
    )  # fmt: skip
    config = DVAEConfig(image_size=32, codebook_size=11, n_group=3, n_block=1, n_hid=8, n_init=8)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Histogram=lambda np_histogram: np_histogram))
    trainer.fit(LitDVAE(config, learning_rate=1e-3), loader, loader)
    assert best.best_model_score == 3.0
    assert trainer.current_epoch == 3
    rows = list(csv.DictReader(Path(table.log_dir, "metrics.csv").read_text().splitlines()))
    assert [float(row["p/fid"]) for row in rows if row["p/fid"]] == [3.0, 4.0, 5.0]
    assert all(0 <= float(row["val/dead_codes"]) <= 11 for row in rows if row["val/dead_codes"])
    assert wandb.metrics["p/fid"] == 5.0
    assert "val/dead_codes" in wandb.metrics
    assert "val/reconstructions" in wandb.images
