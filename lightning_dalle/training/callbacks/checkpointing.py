"""Checkpoint callback that always keeps the newest training state."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn


class LastCheckpoint(ModelCheckpoint):
    """Checkpoint of the newest state in checkpoints/last.ckpt, at regular steps and whenever a fit ends.

    A fit may end by its last step or epoch, `max_time`, EarlyStopping, Ctrl-C, SIGTERM or an error. The first Ctrl-C in
    a single process ends the fit after its step; the second ends it at once. An error inside a step leaves no
    consistent state, so the run then logs how to resume from the last checkpoint.

    Args:
        every_n_train_steps: number of optimizer steps between checkpoints.
    """

    def __init__(self, every_n_train_steps: int) -> None:
        super().__init__(filename="last", every_n_train_steps=every_n_train_steps, enable_version_counter=False)
        self.interval = every_n_train_steps
        self.saved_step = 0
        self.is_interrupted = False
        self.earlier_handler: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self.earlier_handler = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        if trainer.global_step % self.interval == 0:
            self.saved_step = trainer.global_step
        is_last = trainer.global_step == trainer.max_steps
        # Lightning resumes from the last batch of an epoch in the next epoch, but from `on_train_epoch_end` only if the
        # length of the run is given in epochs. In `on_train_end`, averaged weights have replaced the trained ones.
        is_last |= trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if is_last or trainer.should_stop or self.is_interrupted:
            self._save(trainer)
        if self.is_interrupted:
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.should_stop and trainer.state.fn == "fit":  # EarlyStopping
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.should_stop:
            self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn != "fit" or trainer.global_step == 0:
            return
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        # After SIGTERM, Lightning ends all processes after the same step; after other errors, some may still run.
        if batches.ready == batches.completed and (trainer.world_size == 1 or isinstance(exception, SIGTERMException)):
            try:
                self._save(trainer)
            except Exception as error:  # must not hide the exception that ended the run
                rank_zero_warn(f"cannot save {self._file()}: {error}")
        if self.saved_step:
            advice = f"resume from step {self.saved_step} with --ckpt_path {self._file()}"
        else:
            advice = f"no checkpoint was saved; set every_n_train_steps, now {self.interval}, to a smaller number"
        rank_zero_info(f"the run was interrupted at step {trainer.global_step}: {advice}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if self.earlier_handler is not None:
            signal.signal(signal.SIGINT, self.earlier_handler)
            self.earlier_handler = None

    def _save(self, trainer: pl.Trainer) -> None:
        if trainer.global_step > self.saved_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self._file())
            self.saved_step = trainer.global_step

    def _interrupt(self, *signal_and_frame: Any) -> None:
        if self.is_interrupted:
            raise KeyboardInterrupt
        self.is_interrupted = True
        rank_zero_info("Ctrl-C: the fit ends after this step; press Ctrl-C again to end it at once")

    def _file(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath, f"last{self.FILE_EXTENSION}")
