"""Adam's moments in the paper's two 16-bit formats, and an AdamW that keeps them so (appendices B.2 and D).

Knows floating-point formats and parameters. Knows nothing of models, losses or gradient scales.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int16
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dalle.errors import UserError

BIAS = 59
MAX_VARIANCE = 5.0


@dataclass(frozen=True)
class Format:
    """A floating-point number of 16 bits, 6 of them its exponent.

    Subnormals, Inf and NaN are coded as in IEEE 754, rounding is to the nearest, ties to even. The paper tells the bits
    of each field, that there are infinities, and that the largest 1-6-9 number is "slightly less than 16" (appendix
    E.2). So the exponent's bias is 59, against 31 in the middle of its range; that it is the same in 0-6-10 is our
    choice. The smallest normal number is 2^-58, so that a variance is exact to its last bit wherever its root is above
    a fifth of Adam's epsilon, 1e-8; the clip of the variance at 5 leaves room below 16.
    """

    sign_bits: int
    """1, or 0 for numbers that are never negative."""
    significand_bits: int
    """9 beside a sign, 10 without."""

    @property
    def max(self) -> float:
        """The largest finite number."""
        return 16 - 2.0 ** (3 - self.significand_bits)

    def encode(self, x: Float[Tensor, "..."]) -> Int16[Tensor, "..."]:
        """The nearest numbers' bits; Inf from half a step above the largest on. Without a sign, those of |x|."""
        s = self.significand_bits
        size = x.float().abs().clamp(max=16)  # 16 would be the next number and is Inf
        exponent = ((size.view(torch.int32) >> 23) - 127).clamp(min=1 - BIAS)  # subnormals share the least exponent
        steps = (size * _power_of_2(s - exponent)).round()  # whole, up to 2^(s + 1)
        # The carry of a significand that was rounded up goes into the exponent by itself.
        code = (exponent + BIAS - 1 << s) + steps.nan_to_num(0).int()
        code = torch.where(x.isnan(), (63 << s) + 1, code)
        sign = x.signbit().int() * self.sign_bits << 15
        return (code | sign).to(torch.int16)  # of 0-6-10, the upper half wraps to negative integers

    def decode(self, code: Int16[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The numbers in 32 bits, exactly."""
        s = self.significand_bits
        bits = code.int() & 0xFFFF
        exponent, significand = bits >> s & 63, bits & (1 << s) - 1
        steps = torch.where(exponent > 0, significand + (1 << s), significand)
        x = steps * _power_of_2(exponent.clamp(min=1) - BIAS - s)
        x = torch.where(exponent == 63, torch.where(significand == 0, torch.inf, torch.nan), x)
        return torch.where(bits >> 15 & self.sign_bits > 0, -x, x)


def _power_of_2(exponent: Tensor) -> Tensor:
    """By its bits, which is exact on every device."""
    return (exponent + 127 << 23).view(torch.float32)


MEAN = Format(sign_bits=1, significand_bits=9)
VARIANCE = Format(sign_bits=0, significand_bits=10)


class PaperAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019) with the moments of matrices inside blocks in 16 bits (paper, appendix B.2).

    The moments of gains, biases, embeddings and heads are in 32 bits. All arithmetic is in 32 bits: a moment is rounded
    when it is put away. The running variance is clipped by value to 5 before it is used or kept.

    Args:
        params: groups of `decay_groups`; those that are `is_hidden` have moments in 16 bits.
        lr: by update; the paper's largest is the default.
        betas: decay of the running mean and variance.
        eps: added to the root of the variance.
        weight_decay: times the learning rate, subtracted from a parameter as a share of it.

    Raises:
        UserError: if the parameters are split among processes or not in 32 bits.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 4.5e-4,
        betas: tuple[float, float] = (0.9, 0.96),
        eps: float = 1e-8,
        weight_decay: float = 4.5e-2,
    ) -> None:
        parameters = [parameter for group in params for parameter in group["params"]]
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise UserError(
                "PaperAdamW packs the bits of plain tensors, but ModelParallelStrategy splits them: take AdamW"
            )
        if others := {str(p.dtype).removeprefix("torch.") for p in parameters if p.dtype != torch.float32}:
            raise UserError(
                f"PaperAdamW reckons with parameters in float32, but some are in {' and '.join(sorted(others))}: "
                "take a precision that is mixed, or AdamW"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Undoes that torch casts all state to its parameter's dtype; whole numbers of 16 bits survive that exactly."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"] if group["is_hidden"] else ():
                state = self.state[parameter]
                state.update({name: state[name].to(torch.int16) for name in ("mean", "variance") if name in state})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta_1, beta_2) = self.state[parameter], group["betas"]
        if state:
            mean, variance = state["mean"], state["variance"]
            if group["is_hidden"]:
                mean, variance = MEAN.decode(mean), VARIANCE.decode(variance)
        else:
            state["step"] = 0
            mean, variance = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        mean.lerp_(gradient, 1 - beta_1)
        variance.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2).clamp_(max=MAX_VARIANCE)
        unbiased = variance / (1 - beta_2 ** state["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(
            mean, unbiased.sqrt_().add_(group["eps"]), value=-group["lr"] / (1 - beta_1 ** state["step"])
        )
        if group["is_hidden"]:
            mean, variance = MEAN.encode(mean), VARIANCE.encode(variance)
        state["mean"], state["variance"] = mean, variance
