"""Checkpoint callback that always keeps the newest training state."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.rank_zero import rank_zero_info


class LastCheckpoint(ModelCheckpoint):
    """Checkpoint of the newest state in checkpoints/last.ckpt, at regular steps and after the last step of a fit.

    ModelCheckpoint alone omits the last step unless it is a multiple of `every_n_train_steps`. An interrupted run logs
    how to resume.

    Args:
        every_n_train_steps: number of optimizer steps between checkpoints.
    """

    def __init__(self, every_n_train_steps: int) -> None:
        super().__init__(filename="last", every_n_train_steps=every_n_train_steps, enable_version_counter=False)
        self.interval = every_n_train_steps
        self.saved_step = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        is_last = trainer.global_step == trainer.max_steps and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if is_last and trainer.global_step % self.interval:
            trainer.save_checkpoint(self._file())

    def on_save_checkpoint(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.saved_step = trainer.global_step

    def on_exception(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 0:
            return
        if self.saved_step:
            advice = f"resume from step {self.saved_step} with --ckpt_path {self._file()}"
        else:
            advice = f"no checkpoint was saved; set every_n_train_steps, now {self.interval}, to a smaller number"
        rank_zero_info(f"the run was interrupted at step {trainer.global_step}: {advice}")

    def _file(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath, f"last{self.FILE_EXTENSION}")
