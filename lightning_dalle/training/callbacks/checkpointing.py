"""Checkpoint callback that always keeps the newest training state."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint, WeightAveraging
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_dalle.errors import UserError


class LastCheckpoint(ModelCheckpoint):
    """Checkpoint of the newest state in checkpoints/last.ckpt, at regular steps and whenever a fit ends.

    A fit may end by its last step or epoch, `max_time`, EarlyStopping, Ctrl-C, SIGTERM or an error. The first Ctrl-C in
    a single process ends the fit after its step, or after the validation's batch; the second ends it at once. An error
    inside a step or a validation leaves no consistent state, so the run then logs how to resume from the last
    checkpoint. SIGTERM does not wait for the end of a step: a resumed run lacks the gradients accumulated so far.

    Args:
        every_n_train_steps: number of optimizer steps between checkpoints.

    Raises:
        UserError: before the first step, if last.ckpt is of an earlier run and the fit does not resume from it.
    """

    def __init__(self, every_n_train_steps: int) -> None:
        if every_n_train_steps < 1:
            raise UserError(f"every_n_train_steps is {every_n_train_steps}: set it to at least 1")
        super().__init__(filename="last", every_n_train_steps=every_n_train_steps, enable_version_counter=False)
        self.interval = every_n_train_steps
        self.saved_step: int | None = None
        """Step that needs no checkpoint: that of the last one, or the first of this fit; None outside a fit."""
        self.has_saved = False
        """Whether last.ckpt is of this run, or of the one that it resumes."""
        self.step = 0
        """Optimizer step before the current batch."""
        self.is_step_end = False
        """Whether the last batch ended an optimizer step; otherwise gradients are being accumulated."""
        self.is_interrupted = False
        self.earlier_handler: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        file, resumed = self._file(), Path(trainer.ckpt_path or "")
        self.has_saved |= file.exists() and file.resolve() == resumed.resolve()
        is_allowed = self.has_saved or resumed.name.startswith("hpc_ckpt")
        if file.exists() and not is_allowed and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise UserError(
                f"{file} is of an earlier run, which this one would overwrite: resume it with --ckpt_path {file}, move "
                "it, or give this run another folder in trainer.logger or trainer.default_root_dir"
            )
        self.saved_step, self.is_interrupted = trainer.global_step, False
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self.earlier_handler = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self.is_step_end = trainer.global_step > self.step
        if self.is_step_end:
            super().on_train_batch_end(trainer, *args, **kwargs)
        if self.is_step_end and trainer.global_step % self.interval == 0:
            self.saved_step, self.has_saved = trainer.global_step, True
        is_last = trainer.global_step == trainer.max_steps
        # Lightning resumes from the last batch of an epoch in the next epoch, but from `on_train_epoch_end` only if the
        # length of the run is given in epochs. In `on_train_end`, averaged weights have replaced the trained ones.
        is_last |= trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        is_interrupted = self.is_interrupted and self.is_step_end
        if is_last or is_interrupted or self._should_stop(trainer, trainer.current_epoch):
            self._save(trainer)
        if is_interrupted:
            raise KeyboardInterrupt

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Save and end an interrupted validation, with the trained weights in the place of the averaged ones."""
        is_ended = (self.is_interrupted and self.is_step_end) or (trainer.received_sigterm and trainer.world_size == 1)
        if not is_ended or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback.on_validation_epoch_end(trainer, pl_module)
        self._save(trainer)
        raise KeyboardInterrupt if self.is_interrupted else SIGTERMException

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and self._should_stop(trainer, trainer.current_epoch):  # EarlyStopping
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._should_stop(trainer, trainer.current_epoch + 1):
            self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != "fit" or self.saved_step is None:
            return
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        is_consistent = trainer.training and batches.ready == batches.completed
        # After SIGTERM, Lightning ends all processes after the same step; after other errors, some may still run.
        if is_consistent and (trainer.world_size == 1 or isinstance(exception, SIGTERMException)):
            try:
                self._save(trainer)
            except Exception as error:  # must not hide the exception that ended the run
                rank_zero_warn(f"cannot save {self._file()}: {error}")
        if self.has_saved:
            advice = f"resume from step {self.saved_step} with --ckpt_path {self._file()}"
        else:
            advice = f"no checkpoint was saved; set every_n_train_steps, now {self.interval}, to a smaller number"
        rank_zero_info(f"the run was interrupted at step {trainer.global_step}: {advice}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self.saved_step = None
        if self.earlier_handler is not None:
            signal.signal(signal.SIGINT, self.earlier_handler)
            self.earlier_handler = None

    @staticmethod
    def _should_stop(trainer: pl.Trainer, num_epochs: int) -> bool:
        """Return whether a callback ends the fit now, after `num_epochs` whole epochs."""
        is_long_enough = trainer.global_step >= (trainer.min_steps or 0) and num_epochs >= (trainer.min_epochs or 0)
        return trainer.should_stop and is_long_enough

    def _save(self, trainer: pl.Trainer) -> None:
        is_new = self.saved_step is not None and trainer.global_step > self.saved_step
        if is_new and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self._file())
            self.saved_step, self.has_saved = trainer.global_step, True

    def _interrupt(self, *signal_and_frame: Any) -> None:
        if self.is_interrupted:
            raise KeyboardInterrupt
        self.is_interrupted = True
        rank_zero_info("Ctrl-C: the fit ends after this step; press Ctrl-C again to end it at once")

    def _file(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath, f"last{self.FILE_EXTENSION}")
