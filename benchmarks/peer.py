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
from torch import Tensor

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
