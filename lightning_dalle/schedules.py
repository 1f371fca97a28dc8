"""Schedules: functions from the optimizer step to a value such as a learning rate, a temperature or a loss weight."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_dalle.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CosineAnneal:
    """Linear warm-up from 0 to `start`, then half a cosine from `start` to `end`, constant afterwards.

    The paper's temperature, KL weight and dVAE learning rate all follow half a cosine (appendix A.2). The
    transformer's learning rate begins with a linear warm-up (appendix B.2).
    """

    start: float
    """Value after the warm-up (at step 0 when there is none)."""
    end: float
    """Value from step `num_steps` on."""
    num_steps: int | None = None
    """Number of optimizer steps until `end`, warm-up included; None for `fraction` of the fit's steps."""
    fraction: float = 1.0
    """Fraction of the fit's steps that the schedule lasts if `num_steps` is None; above 0, at most 1."""
    warmup_steps: int = 0
    """Number of optimizer steps of the warm-up; limited to half of the schedule if `num_steps` is None."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"a CosineAnneal's fraction is {self.fraction}: set it above 0 and at most 1")
        if not 0 <= self.warmup_steps < (math.inf if self.num_steps is None else self.num_steps):
            below = "" if self.num_steps is None else f" and below its num_steps={self.num_steps}"
            raise UserError(f"a CosineAnneal's warmup_steps is {self.warmup_steps}: set it to at least 0{below}")

    def for_max_steps(self, max_steps: int) -> "CosineAnneal":
        """Return a copy whose `num_steps` is set for a fit of `max_steps` optimizer steps, unless it was given.

        Resuming with more steps therefore stretches the curve.

        Raises:
            UserError: if `num_steps` is None and `max_steps` is -1, because the fit has no limit or the length of its
                data is unknown.
        """
        if self.num_steps is not None:
            return self
        if max_steps < 0:
            raise UserError(
                "a CosineAnneal without num_steps lasts as long as the fit, whose number of steps is unknown: set "
                "trainer.max_steps, or the schedule's num_steps"
            )
        steps = max(round(self.fraction * max_steps), 1)
        return replace(self, num_steps=steps, warmup_steps=min(self.warmup_steps, steps // 2))

    def __call__(self, step: int) -> float:
        """Return the value at an optimizer step, counted from 0."""
        assert self.num_steps is not None, "call `for_max_steps` first"
        if step < self.warmup_steps:
            return self.start * step / self.warmup_steps
        t = min((step - self.warmup_steps) / (self.num_steps - self.warmup_steps), 1.0)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t)) / 2


@dataclass(kw_only=True)
class HalveOnPlateau:
    """Value that rises linearly from 0 to `peak` and is then halved whenever the validation loss stops falling.

    The paper warms the transformer's learning rate up to 4.5e-4 over 5,000 steps and halves it five times (appendix
    B.2). It does not define when the loss stops falling. Here, `patience` validations in a row must fail to lower the
    best loss by 0.1 %.
    """

    peak: float
    """Value after the warm-up."""
    warmup_steps: int = 0
    """Number of optimizer steps of the warm-up."""
    max_reductions: int = 5
    """Largest number of times that the value is halved."""
    patience: int = 3
    """Number of validations in a row without a new best loss, after which the value is halved."""
    best: float = field(default=math.inf, init=False)
    num_bad: int = field(default=0, init=False)
    num_reductions: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name, least in (("warmup_steps", 0), ("max_reductions", 0), ("patience", 1)):
            if getattr(self, name) < least:
                raise UserError(f"a HalveOnPlateau's {name} is {getattr(self, name)}: set it to at least {least}")

    def __call__(self, step: int) -> float:
        """Return the value at an optimizer step, counted from 0, after the validations so far."""
        rise = min(step / self.warmup_steps, 1.0) if self.warmup_steps else 1.0
        return self.peak * rise / 2**self.num_reductions

    def for_max_steps(self, max_steps: int) -> "HalveOnPlateau":
        """Return the schedule unchanged, since it depends on validation losses and not on `max_steps`."""
        return self

    def step(self, loss: float) -> None:
        """Record the loss of one validation, and halve the value at the end of a plateau."""
        self.num_bad += 1
        if loss < self.best * (1 - 1e-3):
            self.best, self.num_bad = loss, 0
        elif self.num_bad >= self.patience and self.num_reductions < self.max_reductions:
            self.num_reductions, self.num_bad = self.num_reductions + 1, 0

    def state_dict(self) -> dict[str, float]:
        """Return the best loss and the counts of bad validations and of reductions, for a checkpoint."""
        return {"best": self.best, "num_bad": self.num_bad, "num_reductions": self.num_reductions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.best, self.num_bad, self.num_reductions = state["best"], state["num_bad"], state["num_reductions"]
