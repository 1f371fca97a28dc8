"""Parameter groups, and what `configure_optimizers` returns."""

from collections.abc import Callable
from typing import Any

from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters in three groups: matrices inside a stack of blocks (`is_hidden`), other weights of two and more
    dimensions, and what is not decayed: gains, biases and embeddings.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    hidden: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in embeddings or "embedding" in name:
            kept.append(parameter)
        else:
            (hidden if parameter.ndim == 2 and "blocks" in name else decayed).append(parameter)
    groups = [
        {"params": hidden, "is_hidden": True},
        {"params": decayed, "is_hidden": False},
        {"params": kept, "is_hidden": False, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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


def configure(
    model: nn.Module, new_optimizer: NewOptimizer, learning_rate: Callable[[int], float]
) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` returns: the optimizer, its learning rate set to the schedule's at every step."""
    optimizer = new_optimizer(decay_groups(model))
    base = optimizer.defaults["lr"]
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(step) / base)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
