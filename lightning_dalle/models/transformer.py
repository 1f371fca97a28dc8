"""A decoder-only transformer whose layers differ in what they may see: pre-LN, GELU, as in Child et al. 2019.

Knows vectors, patterns and caches. Knows nothing of vocabularies, text or images, nor of how one attends.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_dalle.errors import UserError
from lightning_dalle.models.attention.dispatch import attend
from lightning_dalle.models.attention.patterns import Pattern
from lightning_dalle.models.kv_cache import Caches, KVCache


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of the autoregressive transformer; the defaults are the paper's 12 billion parameters."""

    n_layer: int = 64
    """Residual blocks; attention is row, column, row, row and again, and convolutional in the last."""
    n_head: int = 62
    """Attention heads per block; must divide `n_embd`."""
    n_embd: int = 3968
    """Width of the residual stream."""
    conv_kernel: int = 11
    """Side of the last layer's convolutional attention; odd."""
    qk_norm: bool = False
    """Normalise queries and keys (Chameleon); not in the paper."""

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.conv_kernel % 2 == 0:
            raise UserError(f"conv_kernel ({self.conv_kernel}) must be odd, so that the pattern has a middle")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head


class SelfAttention(nn.Module):
    """Multi-head attention under a pattern."""

    def __init__(self, config: TransformerConfig, pattern: Pattern) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.pattern = pattern
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.project = nn.Linear(config.n_embd, config.n_embd)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.norm_q, self.norm_k = nn.LayerNorm(config.head_dim), nn.LayerNorm(config.head_dim)

    def forward(self, x: Float[Tensor, "b n d"], cache: KVCache | None = None) -> Float[Tensor, "b n d"]:
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.n_head, d // self.n_head).permute(2, 0, 3, 1, 4)  # (b, h, n, d / h)
        with torch.autocast(x.device.type, enabled=False):
            if self.qk_norm:
                wide = self.norm_q.weight.dtype  # which autocast leaves alone
                q, k = self.norm_q(q.to(wide)).to(v.dtype), self.norm_k(k.to(wide)).to(v.dtype)
            y = attend(q, k, v, self.pattern) if cache is None else cache.attend(q, k, v)  # (b, h, n, d / h)
        return self.project(y.transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    """Four times as wide inside (12 d^2 parameters a block, paper, Table 2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.project = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.project(F.gelu(self.expand(x)))


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, pattern: Pattern) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.n_embd)
        self.attention = SelfAttention(config, pattern)
        self.norm_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Float[Tensor, "b n d"], cache: KVCache | None = None) -> Float[Tensor, "b n d"]:
        x = x + self.attention(self.norm_1(x), cache)
        return x + self.mlp(self.norm_2(x))


Normal = Callable[[Tensor, float], object]
"""Fills a parameter from a normal distribution around 0 of the given deviation."""


def normal(parameter: Tensor, std: float) -> None:
    """From torch's own generator, all at once."""
    nn.init.normal_(parameter, std=std)


class Transformer(nn.Module):
    """Blocks, one pattern each, and a last norm. Whoever makes one calls `reset_parameters`."""

    def __init__(self, config: TransformerConfig, patterns: list[Pattern]) -> None:
        super().__init__()
        self.patterns = patterns
        self.blocks = nn.ModuleList(Block(config, pattern) for pattern in patterns)
        self.norm = nn.LayerNorm(config.n_embd)

    def reset_parameters(self, draw: Normal = normal) -> None:
        """Matrices drawn, gains 1, biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif name.endswith("project.weight"):  # residual projections scaled by their number (Child et al. 2019)
                draw(parameter, 0.02 / (2 * len(self.blocks)) ** 0.5)
            else:
                draw(parameter, 0.02)

    def forward(self, x: Float[Tensor, "b n d"], caches: Caches | None = None) -> Float[Tensor, "b n d"]:
        """The stream's states; with caches, those of the n positions that follow what the caches hold."""
        if caches is not None:
            caches.read(x.shape[1])
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches.layers[i])
        return self.norm(x)
