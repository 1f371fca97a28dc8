"""Optimizers, learning rates and the randomness of a step.

Knows parameters, schedules and steps. Knows nothing of losses or data.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Generator, Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_dalle.errors import UserError
from lightning_dalle.machine import has_native_bf16


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


def orthogonalised(matrices: Float[Tensor, "l m n"], dtype: torch.dtype, steps: int = 5) -> Float[Tensor, "l m n"]:
    """Matrices with their singular values brought near 1, by Newton-Schulz steps (Jordan et al. 2024).

    As torch.optim.Muon has it, but for the precision, which is always bf16 there, and a processor that only emulates it
    takes up to a hundred times as long; and but for the number, since small products gain from being made together.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at 0, so that small singular values grow fast; not quite 1 in the end
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype, copy=True)
    x = x.mT if is_tall else x
    x.div_(torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices inside a stack of blocks, AdamW for all else.

    Muon makes all directions of a matrix's momentum alike in size. A step takes longer and learns more, the more so
    the larger the batch.

    Args:
        params: groups of `decay_groups`.
        lr: of AdamW.
        hidden_lr_ratio: Muon's learning rate over AdamW's; of a matrix of m by n times the root of m / n, if above 1.
        betas: of AdamW.
        momentum: of Muon, Nesterov's.
        weight_decay: of both.

    Raises:
        UserError: if there is no matrix inside a stack of blocks, or if they are split among processes.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 1e-3,
        hidden_lr_ratio: float = 14.0,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        if not any(group["is_hidden"] for group in params):
            raise UserError("MuonAdamW is for matrices inside a stack of blocks, but this model has none: take AdamW")
        if any(isinstance(parameter, DTensor) for group in params for parameter in group["params"]):
            raise UserError("MuonAdamW needs whole matrices, but ModelParallelStrategy splits them: take AdamW")
        for group in params:
            group["lr"] = lr * hidden_lr_ratio if group["is_hidden"] else lr
        others = [group for group in params if not group["is_hidden"]]
        self.momentum = momentum
        self.adamw = AdamW(others, betas=betas, weight_decay=weight_decay, fused=True)
        hidden = [group for group in params if group["is_hidden"]]
        super().__init__([*hidden, *self.adamw.param_groups], {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> Any:
        """One step of each; groups and state are this optimizer's, whatever schedule or checkpoint set them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["is_hidden"]:
                self._step_hidden(group)
        self.adamw.param_groups = [group for group in self.param_groups if not group["is_hidden"]]
        self.adamw.state = self.state
        self.adamw.step()
        return loss

    @torch.no_grad()
    def _step_hidden(self, group: dict[str, Any]) -> None:
        of_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                of_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in of_shape.items():
            directions = torch.stack([self._direction(parameter) for parameter in parameters])
            dtype = torch.bfloat16 if has_native_bf16(directions.device.type) else torch.float32
            ratio = max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(parameters, orthogonalised(directions, dtype), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * ratio)

    def _direction(self, parameter: nn.Parameter) -> Tensor:
        """The gradient after Nesterov's momentum, which this moves on."""
        assert parameter.grad is not None
        if "momentum" not in self.state[parameter]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momentum = self.state[parameter]["momentum"].lerp_(parameter.grad, 1 - self.momentum)
        return parameter.grad.lerp(momentum, self.momentum)


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
