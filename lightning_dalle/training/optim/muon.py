"""Muon with AdamW for the parameters that it does not apply to."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from lightning_dalle.errors import UserError
from lightning_dalle.hardware import has_native_bf16


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
