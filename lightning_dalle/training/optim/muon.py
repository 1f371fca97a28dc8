"""Muon for matrices inside blocks, combined with AdamW for all other parameters."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from lightning_dalle.errors import UserError
from lightning_dalle.hardware import has_native_bf16


def orthogonalize(matrices: Float[Tensor, "l m n"], dtype: torch.dtype, steps: int = 5) -> Float[Tensor, "l m n"]:
    """Return matrices with their singular values brought close to 1 by Newton-Schulz steps (Jordan et al. 2024).

    Unlike torch.optim.Muon, computes in `dtype`, because bf16 is up to 100 times slower where it is emulated. Also
    batches matrices of one shape, because batched products of small matrices are faster.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at 0 so that small singular values grow fast; converges only near 1
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype, copy=True)
    x = x.mT if is_tall else x
    x.div_(torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7))
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for block matrices, AdamW for all other parameters.

    Muon makes all singular values of a matrix's update about equal. A step takes longer than AdamW's but learns
    more, especially with large batches.

    Args:
        params: parameter groups from `param_groups`.
        lr: learning rate of AdamW.
        block_lr_ratio: Muon's learning rate divided by AdamW's; multiplied by sqrt(m / n) for an m x n matrix if m > n.
        betas: decay rates of AdamW's running mean and variance.
        momentum: Nesterov momentum of Muon.
        weight_decay: weight decay of Muon and AdamW.

    Raises:
        UserError: if the model has no block matrices, or its parameters are sharded.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 1e-3,
        block_lr_ratio: float = 14.0,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        if not any(group["is_block_matrix"] for group in params):
            raise UserError("MuonAdamW needs matrices inside a stack of blocks, but this model has none; use AdamW")
        if any(isinstance(parameter, DTensor) for group in params for parameter in group["params"]):
            raise UserError("MuonAdamW needs whole matrices, but ModelParallelStrategy shards them; use AdamW")
        for group in params:
            group["lr"] = lr * block_lr_ratio if group["is_block_matrix"] else lr
        others = [group for group in params if not group["is_block_matrix"]]
        self.momentum = momentum
        self.adamw = AdamW(others, betas=betas, weight_decay=weight_decay, fused=True)
        block_groups = [group for group in params if group["is_block_matrix"]]
        super().__init__([*block_groups, *self.adamw.param_groups], {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Any = None) -> Any:
        """Step AdamW, which calls the closure, and then Muon.

        AdamW shares this optimizer's groups and state, so that schedules and resumed states apply to it too.
        """
        self.adamw.param_groups = [group for group in self.param_groups if not group["is_block_matrix"]]
        self.adamw.state = self.state
        loss = self.adamw.step(closure)
        for group in self.param_groups:
            if group["is_block_matrix"]:
                self._muon_step(group)
        return loss

    @torch.no_grad()
    def _muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape.setdefault(parameter.shape, []).append(parameter)
        for shape, parameters in by_shape.items():
            directions = torch.stack([self._nesterov_direction(parameter) for parameter in parameters])
            dtype = torch.bfloat16 if has_native_bf16(directions.device.type) else torch.float32
            ratio = max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(parameters, orthogonalize(directions, dtype), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * ratio)

    def _nesterov_direction(self, parameter: nn.Parameter) -> Tensor:
        """Update the momentum of a parameter and return its gradient with Nesterov momentum."""
        assert parameter.grad is not None
        if "momentum" not in self.state[parameter]:
            self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momentum = self.state[parameter]["momentum"].lerp_(parameter.grad, 1 - self.momentum)
        return parameter.grad.lerp(momentum, self.momentum)
