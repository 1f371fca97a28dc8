"""Parameter groups, and the optimizer with its learning-rate schedule."""

import inspect
from collections.abc import Callable
from typing import Any

from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_dalle.errors import UserError


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return up to three parameter groups: block matrices, other decayed weights, and undecayed parameters.

    Block matrices are the two-dimensional weights inside a stack of blocks; only their group has `is_block_matrix`.
    Gains, biases and embeddings have no weight decay.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: list[dict[str, Any]] = [
        {"params": [], "is_block_matrix": True},
        {"params": [], "is_block_matrix": False},
        {"params": [], "is_block_matrix": False, "weight_decay": 0.0},
    ]
    block_matrices, decayed, not_decayed = (group["params"] for group in groups)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or id(parameter) in embeddings or "embedding" in name:
            not_decayed.append(parameter)
        else:
            (block_matrices if parameter.ndim == 2 and "blocks" in name else decayed).append(parameter)
    return [group for group in groups if group["params"]]


class OptimizerFactory:
    """Constructor of an optimizer that is shared, not copied, when its LightningModule is copied.

    EMAWeightAveraging copies the module. The constructor that jsonargparse makes refers to the whole command line, with
    the Trainer and its processes, which cannot be copied.
    """

    def __init__(self, constructor: OptimizerCallable) -> None:
        self.constructor = constructor

    def __call__(self, groups: list[dict[str, Any]]) -> Optimizer:
        return self.constructor(groups)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OptimizerFactory":
        return self


def configure_optimizer(
    model: nn.Module, optimizer_factory: OptimizerFactory, learning_rate: Callable[[int], float]
) -> OptimizerLRSchedulerConfig:
    """Return an optimizer of a model's parameter groups, with its learning rate set by the schedule at every step.

    Raises:
        UserError: if the optimizer was given a learning rate of its own, or has none to set.
    """
    optimizer = optimizer_factory(param_groups(model))
    parameter, base = inspect.signature(type(optimizer)).parameters.get("lr"), optimizer.defaults.get("lr")
    if parameter is None or not base:
        raise UserError(
            f"{type(optimizer).__name__} has no argument lr with a default above 0, by which model.learning_rate could "
            "set its learning rate: choose another optimizer, or override configure_optimizers"
        )
    default = parameter.default
    # A config that replaces another's AdamW by this optimizer keeps AdamW's default, 1e-3, without stating it.
    if base not in (default, 1e-3) and default is not inspect.Parameter.empty:
        raise UserError(
            f"the optimizer has lr={base}, but model.learning_rate sets the learning rate: remove lr from the optimizer"
        )
    scheduler = LambdaLR(optimizer, lambda step: learning_rate(step) / base)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
