"""Schedules as values: a number for every optimizer step.

Knows arithmetic. Knows nothing of optimizers, models or losses.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

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
    num_steps: int | None = None
    """Optimizer steps until `end` is reached, the warm-up included; where none are given, `share` of the fit's."""
    share: float = 1.0
    """Of the fit's `trainer.max_steps`, where `num_steps` are not given; above 0, at most 1."""
    warmup_steps: int = 0
    """Optimizer steps of the linear rise from 0 to `start`; at most half of them, where `num_steps` are not given."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"a schedule's share of the fit is {self.share}, but must be above 0 and at most 1")
        if not 0 <= self.warmup_steps < (math.inf if self.num_steps is None else self.num_steps):
            raise UserError(
                f"a schedule of num_steps={self.num_steps} cannot warm up for warmup_steps={self.warmup_steps}"
            )

    def over(self, max_steps: int) -> "CosineAnneal":
        """The same with `num_steps`, for a fit of so many optimizer steps.

        A fit that goes on for longer than it was begun for goes on along another curve, unless `num_steps` are given.

        Raises:
            UserError: if there are no `num_steps`, and the fit is not counted in steps (-1).
        """
        if self.num_steps is not None:
            return self
        if max_steps < 0:
            raise UserError(
                "a schedule without num_steps lasts for its share of trainer.max_steps, but the fit has none: give "
                "trainer.max_steps, or the schedule's num_steps"
            )
        steps = max(round(self.share * max_steps), 1)
        return replace(self, num_steps=steps, warmup_steps=min(self.warmup_steps, steps // 2))

    def __call__(self, step: int) -> float:
        """The value at an optimizer step (0 is the first) of a schedule that has `num_steps`."""
        assert self.num_steps is not None, "`over` tells how long the fit is"
        if step < self.warmup_steps:
            return self.start * step / self.warmup_steps
        t = min((step - self.warmup_steps) / (self.num_steps - self.warmup_steps), 1.0)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t)) / 2


@dataclass(kw_only=True)
class HalvedOnPlateau:
    """Linear from 0 to `peak` over `warmup_steps`, then halved whenever the validation loss stops falling.

    The paper's transformer (appendix B.2): 0 to 4.5e-4 over 5,000 steps, halved five times. What a plateau is, it does
    not say: here `patience` validations in a row without a loss that is lower by a thousandth.
    """

    peak: float
    """Value after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps of the linear rise."""
    halvings: int = 5
    """How often it is halved at most."""
    patience: int = 3
    """Validations in a row without a better loss after which the value is halved."""
    best: float = field(default=math.inf, init=False)
    waited: int = field(default=0, init=False)
    halved: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name, least in (("warmup_steps", 0), ("halvings", 0), ("patience", 1)):
            if getattr(self, name) < least:
                raise UserError(f"a schedule's {name} is {getattr(self, name)}, but must be at least {least}")

    def __call__(self, step: int) -> float:
        """The value at an optimizer step (0 is the first), after the validations so far."""
        rise = min(step / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        return self.peak * rise / 2**self.halved

    def over(self, max_steps: int) -> "HalvedOnPlateau":
        """The same: it hangs on losses, and not on how long a fit is."""
        return self

    def observe(self, loss: float) -> None:
        """Takes note of a validation."""
        self.waited += 1
        if loss < self.best * (1 - 1e-3):
            self.best, self.waited = loss, 0
        elif self.waited >= self.patience and self.halved < self.halvings:
            self.halved, self.waited = self.halved + 1, 0

    def state_dict(self) -> dict[str, float]:
        """What it has seen, for a checkpoint."""
        return {"best": self.best, "waited": self.waited, "halved": self.halved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.best, self.waited, self.halved = state["best"], state["waited"], state["halved"]
