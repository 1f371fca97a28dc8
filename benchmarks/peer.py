"""The peer of the benchmarks: dalle-pytorch 1.6.6 from PyPI, imported into the same process.

    python -m benchmarks.peer       # install it
    from benchmarks.peer import DALLE, DiscreteVAE, cached_images

The first use of DALLE or DiscreteVAE installs the peer into the git-ignored folder .peer, without its dependencies,
which do not build; the few that it needs are installed beside it. The folder comes last on the path.
"""

import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_dalle.models.dvae import DVAE, DVAEConfig

FOLDER = Path(__file__).parents[1] / ".peer"
PACKAGES = (
    "dalle-pytorch==1.6.6",
    "axial-positional-embedding==0.3.12",
    "rotary-embedding-torch==0.9.1",
    "einops==0.8.2",
)
UNUSED = ("omegaconf", "pkg_resources", "taming", "taming.models", "taming.models.vqgan")
"""Modules that the peer imports for models that no benchmark builds."""


class _Stub(types.ModuleType):
    """Module that has every attribute; each is a function that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: types.SimpleNamespace(version=None)


@contextmanager
def _stubbed(names: tuple[str, ...]) -> Iterator[None]:
    """Provide empty modules during an import, and remove them afterwards so that no other library finds them."""
    stubs = {name: _Stub(name) for name in names if name not in sys.modules}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]


@cache
def _import() -> types.ModuleType:
    if not (FOLDER / "dalle_pytorch").exists():
        subprocess.run(["uv", "pip", "install", "-q", "--no-deps", "--target", str(FOLDER), *PACKAGES], check=True)
    sys.path.append(str(FOLDER))
    with _stubbed(UNUSED):
        return importlib.import_module("dalle_pytorch.dalle_pytorch")


def __getattr__(name: str) -> Any:
    """Return the peer's class DALLE or DiscreteVAE, and install the peer where it is missing."""
    if name not in ("DALLE", "DiscreteVAE"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import(), name)


@torch.no_grad()
def cached_images(dalle: Any, text: Tensor, temperature: float = 1.0, filter_thres: float = 0.5) -> Tensor:
    """Run the peer's `generate_images(use_cache=True)` with its key/value cache repaired.

    As shipped, `forward_with_cond_scale` drops the cache when there is no guidance, so every token recomputes the whole
    sequence. Axial layers use the cache only with `optimize_for_inference=True`, which turns them into masked full
    attention with the same weights. Layers of type conv_like never use it.

    Args:
        dalle: peer's transformer in eval mode.
        text: token ids (b, text_seq_len); 0 is padding.
        temperature: sampling temperature.
        filter_thres: fraction of the lowest logits that are never sampled; 0.5 as shipped.

    Returns:
        images (b, 3, h, w) as the peer's decoder returns them: in [-1, 1] with its default normalisation.
    """

    def pass_on(*args: Any, cond_scale: float = 1.0, cache: dict[str, Any] | None = None) -> Tensor:
        return dalle(*args, cache=cache)

    dalle.forward_with_cond_scale = pass_on
    try:
        return dalle.generate_images(text, use_cache=True, temperature=temperature, filter_thres=filter_thres)
    finally:
        del dalle.forward_with_cond_scale


class PeersDVAE(DVAE):
    """The peer's dVAE with our interface: images in [0, 1] to a grid of codes, and back."""

    def __init__(self, vae: Any) -> None:
        nn.Module.__init__(self)
        self.config = DVAEConfig(image_size=vae.image_size, codebook_size=vae.num_tokens, n_group=vae.num_layers + 1)
        self.vae = vae

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b g g"]:
        return self.vae.get_codebook_indices(images).unflatten(1, (self.config.grid, self.config.grid))

    def decode(self, codes: Int[Tensor, "b g g"]) -> Float[Tensor, "b 3 h w"]:
        return to_unit(self.vae.decode(codes.flatten(1)))


def to_unit(images: Tensor) -> Tensor:
    """Map the peer's pixels from [-1, 1] to [0, 1]."""
    return ((images + 1) / 2).clamp(0, 1)


def main() -> None:
    """Install the peer."""
    _import()


if __name__ == "__main__":
    from benchmarks.recording import run

    run(main)
