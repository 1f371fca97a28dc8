"""AdamW with its moments in the paper's two 16-bit floating-point formats (appendices B.2 and D)."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int16
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_dalle.errors import UserError

EXPONENT_BIAS = 59
MAX_VARIANCE = 5.0


@dataclass(frozen=True)
class FloatFormat:
    """Floating-point format of 16 bits with a 6-bit exponent.

    Subnormals, infinities, NaN and rounding to nearest even follow IEEE 754. The paper states the bits of each field,
    that there are infinities, and that the largest 1-6-9 number is "slightly less than 16" (appendix E.2). The exponent
    bias is therefore 59 instead of the usual 31; the same bias in 0-6-10 is our choice. The smallest normal number is
    2^-58, so a variance loses precision only where its root is below a fifth of Adam's epsilon, 1e-8. Variances are
    clipped at 5, well below 16.
    """

    sign_bits: int
    """Number of sign bits: 1, or 0 for numbers that are never negative."""
    significand_bits: int
    """Number of significand bits: 9 with a sign bit, 10 without."""

    @property
    def max(self) -> float:
        """Largest finite number."""
        return 16 - 2.0 ** (3 - self.significand_bits)

    def encode(self, x: Float[Tensor, "..."]) -> Int16[Tensor, "..."]:
        """Return the bits of the representable numbers nearest to x; a format without a sign bit encodes |x|."""
        s = self.significand_bits
        size = x.float().abs().clamp(max=16)  # 16 is the encoding of infinity
        exponent = ((size.view(torch.int32) >> 23) - 127).clamp(min=1 - EXPONENT_BIAS)  # subnormals have the minimum
        steps = (size * _power_of_2(s - exponent)).round()  # integers up to 2^(s + 1)
        # Addition carries a significand that was rounded up into the exponent.
        code = (exponent + EXPONENT_BIAS - 1 << s) + steps.nan_to_num(0).int()
        code = torch.where(x.isnan(), (63 << s) + 1, code)
        sign = x.signbit().int() * self.sign_bits << 15
        return (code | sign).to(torch.int16)  # the upper half of 0-6-10 wraps to negative integers

    def decode(self, code: Int16[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return the numbers encoded by `code` in fp32, which represents all of them exactly."""
        s = self.significand_bits
        bits = code.int() & 0xFFFF
        exponent, significand = bits >> s & 63, bits & (1 << s) - 1
        steps = torch.where(exponent > 0, significand + (1 << s), significand)
        x = steps * _power_of_2(exponent.clamp(min=1) - EXPONENT_BIAS - s)
        x = torch.where(exponent == 63, torch.where(significand == 0, torch.inf, torch.nan), x)
        return torch.where(bits >> 15 & self.sign_bits > 0, -x, x)


def _power_of_2(exponent: Tensor) -> Tensor:
    return (exponent + 127 << 23).view(torch.float32)  # set by its bits, which is exact on every device


MEAN = FloatFormat(sign_bits=1, significand_bits=9)
VARIANCE = FloatFormat(sign_bits=0, significand_bits=10)


class PaperAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019) that stores the moments of block matrices in 16 bits (paper, appendix B.2).

    The moments of gains, biases, embeddings and heads are stored in 32 bits. All arithmetic is in 32 bits; moments are
    rounded when they are stored. The running variance is clipped to 5 before it is used.

    Args:
        params: groups from `param_groups`; moments are stored in 16 bits where `is_block_matrix` is true.
        lr: learning rate; the default is the paper's after warm-up.
        betas: decay rates of the running mean and variance.
        eps: constant added to the square root of the variance.
        weight_decay: factor of the decoupled weight decay, multiplied by the learning rate.

    Raises:
        UserError: if the parameters are sharded or not in float32.
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
                "PaperAdamW needs whole parameters, but ModelParallelStrategy shards them; use AdamW instead"
            )
        if others := {str(p.dtype).removeprefix("torch.") for p in parameters if p.dtype != torch.float32}:
            raise UserError(
                f"PaperAdamW needs parameters in float32, but some are in {' and '.join(sorted(others))}; "
                "use a mixed --trainer.precision or AdamW"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state and cast 16-bit moments back from float32, to which torch casts the whole state."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"] if group["is_block_matrix"] else ():
                state = self.state[parameter]
                state.update({name: state[name].to(torch.int16) for name in ("mean", "variance") if name in state})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta_1, beta_2) = self.state[parameter], group["betas"]
        if state:
            mean, variance = state["mean"], state["variance"]
            if group["is_block_matrix"]:
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
        if group["is_block_matrix"]:
            mean, variance = MEAN.encode(mean), VARIANCE.encode(variance)
        state["mean"], state["variance"] = mean, variance
