"""DALL-E: a transformer over sequences of caption tokens followed by image codes (paper, section 2.2)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_dalle.models.attention.patterns import Pattern
from lightning_dalle.models.kv_cache import KVCaches
from lightning_dalle.models.transformer import NormalInit, Transformer, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class DALLEConfig:
    """Shape of a DALL-E: the transformer, both vocabularies and both sequence lengths."""

    transformer: TransformerConfig
    """Shape of the transformer."""
    text_len: int
    """Number of caption tokens, padding included (256 in the paper)."""
    text_vocab_size: int
    """Number of text tokens (16,384 in the paper). Larger ids are padding, one for each text position."""
    grid: int
    """Number of image codes along one side (32 in the paper)."""
    codebook_size: int
    """Number of different image codes (8192 in the paper)."""

    @property
    def image_len(self) -> int:
        """Number of image codes in a sequence."""
        return self.grid**2

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DALLEConfig":
        """Build a config from the dictionary that `dataclasses.asdict` made."""
        return cls(**{**values, "transformer": TransformerConfig(**values["transformer"])})


class Logits(NamedTuple):
    """Logits that predict every caption token and every image code of a sequence."""

    text: Float[Tensor, "b t v"]
    image: Float[Tensor, "b i k"]


class DALLE(nn.Module):
    """Embeddings, a transformer, and one output head each for text and image.

    The transformer reads a start vector, the caption tokens and all image codes but the last. Each position predicts
    the next token or code. Logits of a token cover only the text vocabulary, logits of a code only the codebook.
    """

    def __init__(self, config: DALLEConfig) -> None:
        super().__init__()
        self.config = config
        d = config.transformer.n_embd
        self.start = nn.Parameter(torch.empty(d))
        self.text_embedding = nn.Embedding(config.text_vocab_size + config.text_len, d)  # one pad id per position
        self.text_position = nn.Embedding(config.text_len, d)
        self.image_embedding = nn.Embedding(config.codebook_size, d)
        self.row_position = nn.Embedding(config.grid, d)
        self.column_position = nn.Embedding(config.grid, d)
        self.transformer = Transformer(config.transformer, self._patterns())
        self.text_head = nn.Linear(d, config.text_vocab_size)
        self.image_head = nn.Linear(d, config.codebook_size)
        self.reset_parameters()

    def reset_parameters(self, init: NormalInit = nn.init.normal_) -> None:
        """Initialize all parameters, also those of a model created on the meta device: it has no buffers to fill."""
        self.transformer.reset_parameters(init)
        init(self.start, std=0.02)
        for module in self.children():
            if isinstance(module, nn.Embedding | nn.Linear):
                init(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, text_tokens: Int[Tensor, "b t"], codes: Int[Tensor, "b i"]) -> Logits:
        """Return logits of every caption token and image code, each given all tokens and codes before it."""
        x = torch.cat([self.embed_text(text_tokens), self.embed_codes(codes[:, :-1])], dim=1)  # (b, t + i, d)
        x = self.transformer(x)  # (b, t + i, d)
        text, image = x.split([self.config.text_len, self.config.image_len], dim=1)
        return Logits(self.text_head(text), self.image_head(image))

    def prefill(
        self, text_tokens: Int[Tensor, "b t"], codes: Int[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b k"], KVCaches]:
        """Return logits of the code after a caption and the first n codes, and KV caches for `decode_step`."""
        x = torch.cat([self.embed_text(text_tokens), self.embed_codes(codes)], dim=1)  # (b, t + 1 + n, d)
        caches = KVCaches(self.transformer.patterns, like=x)
        return self.image_head(self.transformer(x, caches)[:, -1]), caches

    def decode_step(self, codes: Int[Tensor, " b"], caches: KVCaches) -> Float[Tensor, "b k"]:
        """Append one code to each sequence in the KV caches and return logits of the next code."""
        x = self.image_embedding(codes) + self.image_positions().index_select(0, caches.next_pos)  # (b, d)
        return self.image_head(self.transformer(x[:, None], caches)[:, 0])

    def embed_text(self, text_tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b s d"]:
        """Return the embeddings of the start vector and the caption: s = t + 1 positions."""
        text = self.text_embedding(text_tokens) + self.text_position.weight  # (b, t, d)
        return torch.cat([self.start.expand(len(text), 1, -1), text], dim=1)

    def embed_codes(self, codes: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Return the embeddings of the first n codes in raster order."""
        return self.image_embedding(codes) + self.image_positions()[: codes.shape[1]]

    def image_positions(self) -> Float[Tensor, "i d"]:
        """Return the position embedding of each image code: that of its row plus that of its column."""
        return (self.row_position.weight[:, None] + self.column_position.weight).flatten(0, 1)

    def null_caption(self, batch_size: int) -> Int[Tensor, "b t"]:
        """Return captions of padding only, which give the unconditional logits of classifier-free guidance."""
        pads = torch.arange(self.config.text_len, device=self.start.device) + self.config.text_vocab_size
        return pads.expand(batch_size, -1)

    def _patterns(self) -> list[Pattern]:
        """Return each layer's pattern. The transformer reads a start vector first, and never the last code."""
        c, t = self.config, self.config.transformer
        shape = {"text_len": 1 + c.text_len, "image_len": c.image_len - 1, "grid": c.grid, "kernel": t.conv_kernel}
        return [Pattern(kind=kind, **shape) for kind in t.layer_attention]


def extend_vocabulary(weights: dict[str, Tensor], new_ids: range, vocab_size: int) -> dict[str, Tensor]:
    """Return a DALLE's state dict for a tokenizer that was extended by tokens of `new_ids`, up to `vocab_size`.

    New tokens start from the mean of the old ones, in the text embedding and the text head. Paddings keep their rows.
    """
    extended, old_size = dict(weights), len(weights["text_head.bias"])
    for name in ("text_embedding.weight", "text_head.weight", "text_head.bias"):
        rows = weights[name]
        mean = rows[: new_ids.start].mean(0, keepdim=True)
        added = mean.repeat_interleave(vocab_size - old_size, dim=0)
        extended[name] = torch.cat([rows[:old_size], added, rows[old_size:]])  # paddings follow the vocabulary
        extended[name][new_ids.start : new_ids.stop] = mean
    return extended
