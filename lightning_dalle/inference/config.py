"""How codes are sampled and candidates chosen, as values. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass, field

from lightning_dalle.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How the next code is drawn from its logits; the defaults draw from the model as it is (t = 1, section 2.5)."""

    temperature: float = 1.0
    """Divides the logits; below 1 likelier codes become likelier still."""
    top_k: int | None = None
    """Draw among the k likeliest codes only."""
    top_p: float | None = None
    """Draw among the likeliest codes that together reach this probability only."""
    min_logit: float | None = None
    """Draw among the codes whose logit is at least this only; the likeliest always stays."""
    guidance: float = 1.0
    """Scale of classifier-free guidance away from no caption; 1 is none. More needs a model trained with
    caption_dropout."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"temperature is {self.temperature}, but must be above 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, but must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, but must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class Reranking:
    """How it is measured what choosing among many candidates is worth."""

    prompts: int = 200
    """Captions that are drawn."""
    candidates: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Sizes of sets of candidates, rising, of which the best is taken (Fig. 9c); as many as the last are drawn."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How the candidates are drawn: livelier than one sample alone, since they have to differ."""

    def __post_init__(self) -> None:
        if not self.candidates or self.candidates[0] < 1 or list(self.candidates) != sorted(set(self.candidates)):
            raise UserError(f"candidates are {self.candidates}, but must be rising numbers from 1 on")
