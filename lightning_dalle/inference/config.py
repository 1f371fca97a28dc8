"""Settings of sampling and generation, in a module without torch, which `--help` imports quickly."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_dalle.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings that turn logits into the next code; the defaults sample the model's own distribution (section 2.5)."""

    temperature: float = 1.0
    """Divisor of the logits; below 1 likely codes become likelier."""
    top_k: int | None = None
    """Number of likeliest codes to sample from; null for all."""
    top_p: float | None = None
    """Total probability of the likeliest codes, from which codes are sampled (nucleus sampling); null for all."""
    logit_threshold: float | None = None
    """Lowest logit of a code that may be sampled; null for no limit. The likeliest code may always be sampled."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 turns it off. Other values need a model trained with caption_dropout."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}, but must be above 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, but must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, but must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of the images that are generated for each prompt."""

    num_candidates: int = 1
    """Number of images sampled for each prompt (512 in the paper)."""
    top: int | None = None
    """Number of candidates to keep, the best by score; null for all. Keeping fewer needs a scorer, such as a CLIP."""
    seed: int = 0
    """Seed of the first candidate; each further candidate's seed is one higher."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Settings that turn logits into codes."""
    batch_size: int = 64
    """Number of images sampled at once; it does not change the images."""

    def __post_init__(self) -> None:
        check_candidates(self.num_candidates, self.num_kept)
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}, but must be at least 1")

    @property
    def num_kept(self) -> int:
        """Number of images returned for each prompt."""
        return self.num_candidates if self.top is None else self.top

    def replace(self, **changes: Any) -> "GenerationConfig":
        """Return a copy with other values of fields, of this config or of its `sampling`.

        Raises:
            UserError: if neither has a field of that name, or a value is not allowed.
        """
        names = [*vars(self), *vars(self.sampling)]
        for name in sorted(changes.keys() - set(names)):
            nearest = ", ".join(difflib.get_close_matches(name, names, n=1) or names)
            raise UserError(f"there is no setting {name} (given: {changes[name]!r}): use {nearest}")
        sampling = {name: changes.pop(name) for name in vars(self.sampling) if name in changes}
        return replace(self, **{**changes, "sampling": replace(changes.get("sampling", self.sampling), **sampling)})


def list_prompts(prompts: str | Sequence[str]) -> list[str]:
    """Return prompts as a list, with one entry for a string; raise a UserError if one is empty."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(f"prompt {i + 1} of {len(prompts)} is empty: give it text, or remove it")
    return prompts


def check_candidates(candidates: int | Sequence[int], top: int = 1, has_scorer: bool = True) -> None:
    """Raise a UserError if the best `top` images cannot be chosen among a number of candidates.

    Args:
        candidates: number of candidates of one prompt, or several numbers in increasing order, one per choice.
        top: number of images to keep in each choice.
        has_scorer: whether a scorer ranks the candidates; only then may fewer be kept than sampled.
    """
    numbers = [candidates] if isinstance(candidates, int) else list(candidates)
    if not numbers or numbers[0] < 1 or numbers != sorted(set(numbers)):
        given = ", ".join(map(str, numbers)) or "none"
        order = " and in increasing order" if len(numbers) > 1 else ""
        raise UserError(f"the number of candidates is {given}, but must be at least 1{order}")
    if not 1 <= top <= numbers[0]:
        raise UserError(f"cannot keep {top} of {numbers[0]} candidates: top must be from 1 to {numbers[0]}")
    if top < numbers[-1] and not has_scorer:
        raise UserError(
            f"cannot choose the best {top} of {numbers[-1]} candidates without a scorer: give a CLIP, or keep all"
        )
