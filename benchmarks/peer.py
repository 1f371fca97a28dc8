"""dalle-pytorch 1.6.6 from PyPI, the peer that the benchmarks set beside us, in this very process.

    from benchmarks.peer import DALLE, DiscreteVAE, cached_images

It is installed once, without its dependencies, which would not build, into the git-ignored folder .peer; those of them
that it really uses and we lack come along. The folder stands last on the path, so that torch and all else are ours.
"""

import importlib
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
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
"""Modules that it imports for the sake of models that no benchmark builds."""


class _Stub(types.ModuleType):
    """A module with whatever is asked of it; all of it does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: types.SimpleNamespace(version=None)


@contextmanager
def _stubbed(names: tuple[str, ...]) -> Iterator[None]:
    """Modules that are there for the time of an import alone, lest another library takes them for real."""
    stubs = {name: _Stub(name) for name in names if name not in sys.modules}
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in stubs:
            del sys.modules[name]


def _import() -> types.ModuleType:
    if not (FOLDER / "dalle_pytorch").exists():
        subprocess.run(["uv", "pip", "install", "-q", "--no-deps", "--target", str(FOLDER), *PACKAGES], check=True)
    sys.path.append(str(FOLDER))
    with _stubbed(UNUSED):
        return importlib.import_module("dalle_pytorch.dalle_pytorch")


_peer = _import()
DALLE = _peer.DALLE
DiscreteVAE = _peer.DiscreteVAE


@torch.no_grad()
def cached_images(dalle: Any, text: Tensor, temperature: float = 1.0, filter_thres: float = 0.5) -> Tensor:
    """Its `generate_images(use_cache=True)` with the cache really passed on: its repaired best.

    As shipped `forward_with_cond_scale` drops the cache where there is no guidance, so that every token recomputes the
    whole sequence. Axial layers are served from the cache only in a DALLE of `optimize_for_inference=True`, which makes
    them masked full attention; the weights are the same. Its conv_like layers never are.

    Args:
        dalle: in eval mode.
        text: token ids, (b, text_seq_len); 0 is padding.
        temperature: of the sampling.
        filter_thres: the share of the logits, the least, that is never drawn; 0.5 as shipped.

    Returns:
        images as its dVAE's decoder gives them, (b, 3, h, w): in [-1, 1] for one of the default normalization.
    """

    def pass_on(*args: Any, cond_scale: float = 1.0, cache: dict[str, Any] | None = None) -> Tensor:
        return dalle(*args, cache=cache)

    dalle.forward_with_cond_scale = pass_on
    try:
        return dalle.generate_images(text, use_cache=True, temperature=temperature, filter_thres=filter_thres)
    finally:
        del dalle.forward_with_cond_scale


class PeersDVAE(DVAE):
    """The peer's dVAE by our names: images in [0, 1] to a grid of codes, and back."""

    def __init__(self, vae: Any) -> None:
        nn.Module.__init__(self)
        self.config = DVAEConfig(image_size=vae.image_size, codebook_size=vae.num_tokens, n_group=vae.num_layers + 1)
        self.vae = vae

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b g g"]:
        return self.vae.get_codebook_indices(images).unflatten(1, (self.config.grid, self.config.grid))

    def decode(self, codes: Int[Tensor, "b g g"]) -> Float[Tensor, "b 3 h w"]:
        return to_unit(self.vae.decode(codes.flatten(1)))


def to_unit(images: Tensor) -> Tensor:
    """The peer's pixels, which its default normalization has in [-1, 1], to [0, 1]."""
    return ((images + 1) / 2).clamp(0, 1)
