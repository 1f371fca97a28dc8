"""Optimizers, learning rates and the randomness of a step.

Knows parameters, schedules and steps. Knows nothing of losses or data.
"""

import hashlib
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Generator, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_dalle.schedules import CosineAnneal


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters in two groups: weights of matrices, and what is not decayed: gains, biases and embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        (kept if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]


class NewOptimizer:
    """An optimizer's constructor that copies of a module share.

    The one that jsonargparse makes holds on to the whole command line, the Trainer and its processes among it, and
    EMAWeightAveraging copies a module with all that it holds.
    """

    def __init__(self, new: OptimizerCallable) -> None:
        self.new = new

    def __call__(self, groups: list[dict[str, Any]]) -> Optimizer:
        """An optimizer of groups of parameters."""
        return self.new(groups)

    def __deepcopy__(self, memo: dict[int, Any]) -> "NewOptimizer":
        return self


def configure(model: nn.Module, new_optimizer: NewOptimizer, learning_rate: CosineAnneal) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` returns: the optimizer, its learning rate set to the schedule's at every step."""
    optimizer = new_optimizer(decay_groups(model))
    base = optimizer.defaults["lr"]
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(step) / base)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def is_logged(trainer: pl.Trainer) -> bool:
    """Whether Lightning writes the scalars of this training step. Each `self.log` costs 0.4 ms, written or not."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and (trainer.global_step + 1) % every == 0  # 0 switches logging off


def step_generator(device: torch.device, *numbers: int) -> Generator:
    """A generator that depends on the given numbers (seed, step, rank, ...) alone.

    So the noise of a step is the same in a resumed run as in an unbroken one, with no state to save.
    """
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
