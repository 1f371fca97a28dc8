"""When a run is saved.

Knows the Trainer's hooks and steps. What is saved is the models' business.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.rank_zero import rank_zero_info


class LastCheckpoint(ModelCheckpoint):
    """Keeps the newest state in checkpoints/last.ckpt: every so many steps, and after the last step of a fit, which
    Lightning's own forgets where that is no multiple of them.

    A run that is interrupted says where it can go on from.

    Args:
        every_n_train_steps: steps between two savings.
    """

    def __init__(self, every_n_train_steps: int) -> None:
        super().__init__(filename="last", every_n_train_steps=every_n_train_steps, enable_version_counter=False)
        self.steps = every_n_train_steps
        self.saved_at = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        is_last = trainer.global_step == trainer.max_steps and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if is_last and trainer.global_step % self.steps:
            trainer.save_checkpoint(self._file())

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.saved_at = trainer.global_step

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.global_step == 0:
            return
        if self.saved_at:
            said = f"go on from step {self.saved_at} with --ckpt_path {self._file()}"
        else:
            said = f"nothing was saved since it began, which happens at every {self.steps} steps"
        rank_zero_info(f"The run ended at step {trainer.global_step}: {said}")

    def _file(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath, f"last{self.FILE_EXTENSION}")
