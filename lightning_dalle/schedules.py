"""Schedules as values: a number for every optimizer step.

Knows arithmetic. Knows nothing of optimizers, models or losses.
"""

import math
from dataclasses import dataclass

from lightning_dalle.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CosineAnneal:
    """Linear from 0 to `start` over `warmup_steps`, half a cosine from `start` to `end` by `num_steps`, constant after.

    The paper's temperature, KL weight and dVAE learning rate all follow half a cosine (appendix A.2); the
    transformer's learning rate begins with a linear warm-up (appendix B.2).
    """

    start: float
    """Value after the warm-up (at step 0 when there is none)."""
    end: float
    """Value at `num_steps` and ever after."""
    num_steps: int
    """Optimizer steps until `end` is reached, the warm-up included."""
    warmup_steps: int = 0
    """Optimizer steps of the linear rise from 0 to `start`."""

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.num_steps:
            raise UserError(
                f"a schedule of num_steps={self.num_steps} cannot warm up for warmup_steps={self.warmup_steps}"
            )

    def __call__(self, step: int) -> float:
        """The value at an optimizer step (0 is the first)."""
        if step < self.warmup_steps:
            return self.start * step / self.warmup_steps
        t = min((step - self.warmup_steps) / (self.num_steps - self.warmup_steps), 1.0)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t)) / 2
