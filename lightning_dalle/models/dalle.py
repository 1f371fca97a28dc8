"""DALL-E: one stream of caption tokens followed by image codes (paper, section 2.2).

Knows token ids and codes, and that image ids follow text ids. Knows nothing of characters, pixels or sampling.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_dalle.models.attention.patterns import Pattern, layer_kinds
from lightning_dalle.models.kv_cache import Caches
from lightning_dalle.models.transformer import Normal, Transformer, TransformerConfig, normal


@dataclass(frozen=True, kw_only=True)
class DALLEConfig:
    """A transformer and the two vocabularies that it reads."""

    transformer: TransformerConfig
    """Shape of the transformer."""
    text_len: int
    """Caption tokens in every stream, padding included (256 in the paper)."""
    text_vocab_size: int
    """Ids of caption tokens; the ids after them pad, one for each position (16,384 in the paper)."""
    grid: int
    """Image codes along one side (32 in the paper)."""
    codebook_size: int
    """Ids of image codes (8192 in the paper)."""

    @property
    def image_len(self) -> int:
        """Image codes in every stream."""
        return self.grid**2

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DALLEConfig":
        """Inverse of `dataclasses.asdict`."""
        return cls(**{**values, "transformer": TransformerConfig(**values["transformer"])})


class Logits(NamedTuple):
    """Of every next token of the stream, text and image apart."""

    text: Float[Tensor, "b t v"]
    image: Float[Tensor, "b i k"]


class DALLE(nn.Module):
    """The transformer between embeddings and two heads.

    The stream that the transformer reads is a start vector, the caption's tokens and all image codes but the last;
    each position predicts what follows it. Text positions never predict image codes, nor the other way round.
    """

    def __init__(self, config: DALLEConfig) -> None:
        super().__init__()
        self.config = config
        d = config.transformer.n_embd
        self.start = nn.Parameter(torch.empty(d))
        self.text_embedding = nn.Embedding(config.text_vocab_size + config.text_len, d)  # a pad for each position
        self.text_position = nn.Embedding(config.text_len, d)
        self.image_embedding = nn.Embedding(config.codebook_size, d)
        self.row_position = nn.Embedding(config.grid, d)
        self.column_position = nn.Embedding(config.grid, d)
        self.transformer = Transformer(config.transformer, list(self._patterns()))
        self.text_head = nn.Linear(d, config.text_vocab_size)
        self.image_head = nn.Linear(d, config.codebook_size)
        self.reset_parameters()

    def reset_parameters(self, draw: Normal = normal) -> None:
        """Begins anew: all weights of the model, which has no buffers."""
        self.transformer.reset_parameters(draw)
        draw(self.start, 0.02)
        for module in self.children():
            if isinstance(module, nn.Embedding | nn.Linear):
                draw(module.weight, 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, text_tokens: Int[Tensor, "b t"], codes: Int[Tensor, "b i"]) -> Logits:
        """Logits of the whole caption and of the whole image, given each what stands before it."""
        x = torch.cat([self.embed_text(text_tokens), self.embed_codes(codes[:, :-1])], dim=1)  # (b, t + i, d)
        x = self.transformer(x)  # (b, t + i, d)
        text, image = x.split([self.config.text_len, self.config.image_len], dim=1)
        return Logits(self.text_head(text), self.image_head(image))

    def begin(self, text_tokens: Int[Tensor, "b t"], codes: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b k"], Caches]:
        """Logits of the code that follows a caption and the first n codes, and what `go_on` goes on from."""
        x = torch.cat([self.embed_text(text_tokens), self.embed_codes(codes)], dim=1)  # (b, t + 1 + n, d)
        caches = Caches(self.transformer.patterns, like=x)
        return self.image_head(self.transformer(x, caches)[:, -1]), caches

    def go_on(self, codes: Int[Tensor, " b"], caches: Caches) -> Float[Tensor, "b k"]:
        """Logits of the code that follows one more code."""
        x = self.image_embedding(codes) + self.image_positions().index_select(0, caches.following)  # (b, d)
        return self.image_head(self.transformer(x[:, None], caches)[:, 0])

    def embed_text(self, text_tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b s d"]:
        """The start vector and the caption: s = t + 1 positions."""
        text = self.text_embedding(text_tokens) + self.text_position.weight  # (b, t, d)
        return torch.cat([self.start.expand(len(text), 1, -1), text], dim=1)

    def embed_codes(self, codes: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """The first n codes of the grid in raster order."""
        return self.image_embedding(codes) + self.image_positions()[: codes.shape[1]]

    def image_positions(self) -> Float[Tensor, "i d"]:
        """A row's and a column's embedding for each code of the grid."""
        return (self.row_position.weight[:, None] + self.column_position.weight).flatten(0, 1)

    def null_caption(self, batch_size: int) -> Int[Tensor, "b t"]:
        """No caption at all: padding only. What classifier-free guidance leads away from."""
        pads = torch.arange(self.config.text_len, device=self.start.device) + self.config.text_vocab_size
        return pads.expand(batch_size, -1)

    def _patterns(self) -> Iterator[Pattern]:
        """One a layer, over the positions that the transformer reads: start, caption, all codes but the last."""
        c = self.config
        for kind in layer_kinds(c.transformer.n_layer):
            yield Pattern(
                kind=kind,
                text_len=1 + c.text_len,
                image_len=c.image_len - 1,
                grid=c.grid,
                kernel=c.transformer.conv_kernel,
            )
