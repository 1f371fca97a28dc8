"""Checkpoint checks, random generators and logging policy of the LightningModules."""

import hashlib
from typing import Any

import pytorch_lightning as pl
from torch import Generator

from lightning_dalle.checkpoints import NAMES, check_resumable
from lightning_dalle.errors import UserError


def loaded_config(module: pl.LightningModule, checkpoint: dict[str, Any], model: str) -> dict[str, Any]:
    """Return the config of a model ("dvae", "dalle" or "clip") in the checkpoint that a LightningModule loads.

    Raises:
        UserError: if the checkpoint is of another model, or a fit cannot resume from its format.
    """
    path = module.trainer.ckpt_path
    models = [name for name in NAMES if f"{name}_config" in checkpoint]
    if models[-1:] != [model]:  # a DALL-E's checkpoint also contains its dVAE
        problem = f"cannot load {path} into {type(module).__name__}: it is not a {NAMES[model]} checkpoint"
        raise UserError(f"{problem}; choose another --ckpt_path")
    if module.trainer.state.fn == "fit":
        check_resumable(checkpoint, path)
    return checkpoint[f"{model}_config"]


def should_log(trainer: pl.Trainer) -> bool:
    """Return whether Lightning writes this step's scalars; otherwise `self.log` would cost 0.4 ms for nothing."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.global_step + 1) % every == 0  # 0 switches logging off


def step_generator(module: pl.LightningModule, seed: int, batch_idx: int, *purpose: int) -> Generator:
    """Return a generator that depends only on seed, step, batch index, rank and purpose.

    A resumed run thus samples the same noise as an uninterrupted one. `purpose` distinguishes the uses within a step.
    """
    numbers = (seed, module.global_step, batch_idx, module.global_rank, *purpose)
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return Generator(module.device).manual_seed(int.from_bytes(digest[:7], "big"))
