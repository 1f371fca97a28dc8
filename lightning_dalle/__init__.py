"""DALL-E (Ramesh et al. 2021), whole, as a PyTorch Lightning experiment repo."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dalle.inference.config import SamplingOptions
    from lightning_dalle.inference.pipeline import TextToImage

__all__ = ["SamplingOptions", "TextToImage"]


def __getattr__(name: str) -> Any:
    """Imports torch only when a name is asked for that needs it: the command line answers `--help` without."""
    if name == "TextToImage":
        from lightning_dalle.inference.pipeline import TextToImage

        return TextToImage
    if name == "SamplingOptions":
        from lightning_dalle.inference.config import SamplingOptions

        return SamplingOptions
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
