"""DALL-E (Ramesh et al. 2021) in PyTorch Lightning: data, training, sampling and evaluation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_dalle.inference.config import GenerationConfig, SamplingConfig
    from lightning_dalle.inference.pipeline import TextToImage

    __version__: str

__all__ = ["GenerationConfig", "SamplingConfig", "TextToImage"]


def __getattr__(name: str) -> Any:
    """Return a public name, imported on its first use, since `--help` must answer without importing torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("lightning-dalle")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = "pipeline" if name == "TextToImage" else "config"
    return getattr(import_module(f"lightning_dalle.inference.{module}"), name)
