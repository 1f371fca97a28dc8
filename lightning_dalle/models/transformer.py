"""Decoder-only transformer with one attention pattern per layer: pre-LN, GELU, as in Child et al. 2019."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lightning_dalle.errors import UserError
from lightning_dalle.models.attention.dispatch import attend
from lightning_dalle.models.attention.patterns import PATTERNS, Pattern
from lightning_dalle.models.kv_cache import KVCache, KVCaches


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Shape of the autoregressive transformer; the defaults give the paper's 12 billion parameters."""

    n_layer: int = 64
    """Number of residual blocks."""
    n_head: int = 62
    """Number of attention heads per block; must divide `n_embd`."""
    n_embd: int = 3968
    """Width of the residual stream."""
    conv_kernel: int = 11
    """Side of the convolutional pattern's square; odd."""
    qk_norm: bool = False
    """Whether a LayerNorm normalizes the queries and keys of each head, as in Chameleon; not in the paper."""
    attention: Sequence[str] = ("row", "column", "row", "row")
    """Attention patterns of the blocks, repeated in this order (paper, appendix B.1)."""
    last_attention: str = "conv"
    """Attention pattern of the last block."""

    def __post_init__(self) -> None:
        if isinstance(self.attention, str) or not self.attention:
            raise UserError(f"attention is {self.attention!r}; expected a list of patterns, such as [row, column]")
        object.__setattr__(self, "attention", tuple(self.attention))  # YAML and JSON have lists
        unknown = [name for name in (*self.attention, self.last_attention) if name not in PATTERNS]
        if unknown:
            known = ", ".join(PATTERNS)
            raise UserError(f"attention pattern {unknown[0]!r} is unknown; expected {known}, or import its module")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.conv_kernel % 2 == 0:
            raise UserError(f"conv_kernel ({self.conv_kernel}) must be odd, so that the pattern has a center")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def layer_attention(self) -> list[str]:
        """Attention pattern of each block."""
        return [self.attention[i % len(self.attention)] for i in range(self.n_layer - 1)] + [self.last_attention]


class SelfAttention(nn.Module):
    """Multi-head self-attention in which each position sees the earlier positions of an attention pattern."""

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
                dtype = self.norm_q.weight.dtype  # fp32 even under autocast
                q, k = self.norm_q(q.to(dtype)).to(v.dtype), self.norm_k(k.to(dtype)).to(v.dtype)
            if cache is not None and cache.is_filled:  # decode step
                keys, values, bias = cache.update(k, v)  # (b, h, t + w, d / h) each, (1, t + w)
                y = F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=bias).to(q.dtype)
            else:
                if cache is not None:
                    cache.prefill(k, v)
                y = attend(q, k, v, self.pattern)  # (b, h, n, d / h)
        return self.project(y.transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    """Two-layer perceptron of hidden width 4 d, with 8 d^2 of the 12 d^2 weights of a block (paper, Table 2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.project = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.project(F.gelu(self.expand(x)))


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: TransformerConfig, pattern: Pattern) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.n_embd)
        self.attention = SelfAttention(config, pattern)
        self.norm_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Float[Tensor, "b n d"], cache: KVCache | None = None) -> Float[Tensor, "b n d"]:
        x = x + self.attention(self.norm_1(x), cache)
        return x + self.mlp(self.norm_2(x))


NormalInit = Callable[..., object]
"""Function that fills a parameter from a normal distribution of mean 0 and the standard deviation `std`."""


class Transformer(nn.Module):
    """Residual blocks, each with its attention pattern, and a final LayerNorm. Call `reset_parameters` before use."""

    def __init__(self, config: TransformerConfig, patterns: list[Pattern]) -> None:
        super().__init__()
        self.patterns = patterns
        self.blocks = nn.ModuleList(Block(config, pattern) for pattern in patterns)
        self.norm = nn.LayerNorm(config.n_embd)

    def reset_parameters(self, init: NormalInit = nn.init.normal_) -> None:
        """Initialize matrices from normal distributions, gains to 1 and biases to 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 1:
                nn.init.ones_(parameter)
            elif name.endswith("project.weight"):  # residual projections scaled by their number (Child et al. 2019)
                init(parameter, std=0.02 / (2 * len(self.blocks)) ** 0.5)
            else:
                init(parameter, std=0.02)

    def forward(self, x: Float[Tensor, "b n d"], caches: KVCaches | None = None) -> Float[Tensor, "b n d"]:
        """Return hidden states of a whole sequence or, with caches, of the n positions that follow the cached ones."""
        if caches is not None:
            caches.advance(x.shape[1])
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches.layers[i])
        return self.norm(x)
