"""Scalars, images and histograms for every logger of a Trainer that can take them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_dalle.images import to_array


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Return the folder that the first logger has for this run, above its checkpoints; None without a logger.

    Only rank 0 may call this, since other ranks do not know the version of the run.
    """
    logger = trainer.logger
    if logger is None:
        return None
    if logger.log_dir:
        return Path(logger.log_dir)
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), str(logger.version))


def shows_images(trainer: pl.Trainer) -> bool:
    """Return whether this process logs images now: it has rank 0, no sanity check runs, and a logger takes images."""
    takers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger | WandbLogger)]
    return trainer.is_global_zero and not trainer.sanity_checking and bool(takers)


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Log numbers that are no metrics of a step or an epoch, for which `LightningModule.log` exists."""
    for logger in trainer.loggers if scalars else ():
        logger.log_metrics(dict(scalars), step)


def log_image(trainer: pl.Trainer, name: str, image: Image.Image | Figure, step: int) -> None:
    """Log an image or a figure to TensorBoard and W&B; other loggers ignore it."""
    if isinstance(image, Figure):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(image)
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, to_array(image), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [image], step=step)


def log_histogram(trainer: pl.Trainer, name: str, counts: Int[Tensor, " n"], step: int) -> None:
    """Log how often each of the values 0 to n - 1 occurs, to TensorBoard and W&B; other loggers ignore it."""
    counts = counts.cpu()
    values = torch.arange(len(counts)).repeat_interleave(counts)
    bins = min(len(counts), 512)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(name, values, step, bins=bins)
        elif isinstance(logger, WandbLogger):
            import wandb  # installed if a WandbLogger exists

            histogram = wandb.Histogram(np_histogram=np.histogram(values.numpy(), bins))
            logger.log_metrics({name: histogram}, step)
