"""Byte-level BPE tokenizer of captions, with BPE dropout and a padding id per position (paper, sec. 2.2 and B.1)."""

import itertools
import json
import random
import warnings
from collections.abc import Iterable
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lightning_dalle.errors import UserError


class CaptionTokenizer:
    """Lower-casing byte-level BPE tokenizer that pads captions to `text_len` tokens.

    Ids below `vocab_size` are tokens. Id `vocab_size + p` is the padding of position p.
    """

    def __init__(self, bpe: Tokenizer, vocab_size: int, text_len: int) -> None:
        self.bpe, self.vocab_size, self.text_len = bpe, vocab_size, text_len
        merges = json.loads(bpe.to_str())["model"]["merges"]
        self._has_warned = False
        self._id = bpe.get_vocab()
        self._rank = {(left, right): rank for rank, (left, right) in enumerate(merges)}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, text_len: int) -> "CaptionTokenizer":
        """Train a tokenizer of at most `vocab_size` tokens, including the 256 bytes, on captions."""
        if vocab_size < 256:
            raise UserError(f"vocab_size is {vocab_size}, but must be at least 256: one token for each byte")
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe, vocab_size, text_len)

    def extend(self, captions: Iterable[str], vocab_size: int) -> "CaptionTokenizer":
        """Return a tokenizer that continues this one's BPE training on captions, up to `vocab_size` tokens.

        Present tokens keep their ids. Each new token merges the most frequent pair of tokens, if it occurs twice.
        """
        if vocab_size < self.vocab_size:
            raise UserError(f"vocab_size is {vocab_size}, but must be at least the tokenizer's {self.vocab_size}")
        state = json.loads(self.bpe.to_str())
        vocab, merges = state["model"]["vocab"], dict.fromkeys(map(tuple, state["model"]["merges"]))
        token_of = {0xF0000 + i: token for token, i in vocab.items()}  # the library trains on private characters

        @cache
        def to_private(word: str) -> str:
            return "".join(chr(0xF0000 + token.id) for token in self.bpe.model.tokenize(word))

        bpe = Tokenizer(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=[*map(chr, token_of)], min_frequency=2, show_progress=False
        )
        bpe.train_from_iterator((to_private(word) for caption in captions for word in self._words(caption)), trainer)
        for pair in json.loads(bpe.to_str())["model"]["merges"]:
            left, right = (part.translate(token_of) for part in pair)
            merges[left, right] = None
            vocab.setdefault(left + right, len(vocab))  # other merges may form the same token
        state["model"]["merges"] = list(merges)
        return CaptionTokenizer(Tokenizer.from_str(json.dumps(state)), vocab_size, self.text_len)

    def extends(self, other: "CaptionTokenizer") -> bool:
        """Return whether this tokenizer has all tokens of another with the same ids, as `extend` makes it."""
        return other._id.items() <= self._id.items() and other._rank.items() <= self._rank.items()

    def encode(self, caption: str, dropout: float = 0.0, rng: random.Random | None = None) -> list[int]:
        """Return the token ids of a caption, without padding or truncation.

        Args:
            caption: any text.
            dropout: probability of dropping each possible merge (Provilkov et al. 2020); the paper trains with 0.1.
            rng: generator for the dropout. The tokenizers library has a dropout of its own, but it cannot be seeded.
        """
        if not dropout:
            return self.bpe.encode(caption).ids
        if rng is None:
            raise UserError(f"dropout is {dropout}, which needs a random generator: give rng")
        return [self._id[token] for word in self._words(caption) for token in self._merge(list(word), dropout, rng)]

    def _words(self, caption: str) -> list[str]:
        words = self.bpe.pre_tokenizer.pre_tokenize_str(self.bpe.normalizer.normalize_str(caption))
        return [word for word, _ in words]

    def _merge(self, tokens: list[str], dropout: float, rng: random.Random) -> list[str]:
        """Apply the best of the merges that are not dropped, and repeat until no merge is left."""
        while True:
            pairs = enumerate(itertools.pairwise(tokens))
            merges = sorted((self._rank[pair], i) for i, pair in pairs if pair in self._rank)
            best = next((i for _, i in merges if rng.random() >= dropout), None)
            if best is None:
                return tokens
            tokens[best : best + 2] = [tokens[best] + tokens[best + 1]]

    def pad(self, ids: list[int]) -> tuple[list[int], bool]:
        """Return ids padded or truncated to `text_len`, and whether any was cut off; the first truncation warns."""
        is_truncated = len(ids) > self.text_len
        if is_truncated and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"a caption of {len(ids)} tokens was truncated to data.text_len={self.text_len}. "
                "Training logs the number of truncated captions as data/captions_truncated.",
                stacklevel=2,
            )
        ids = ids[: self.text_len]
        return ids + [self.vocab_size + position for position in range(len(ids), self.text_len)], is_truncated

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids; padding ids are skipped."""
        return self.bpe.decode([i for i in ids if i < self.vocab_size]).strip()

    def to_json(self) -> str:
        """Return the whole tokenizer as JSON, as checkpoints store it."""
        values = {"bpe": json.loads(self.bpe.to_str()), "vocab_size": self.vocab_size, "text_len": self.text_len}
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "CaptionTokenizer":
        """Create a tokenizer from the JSON that `to_json` returns."""
        values = json.loads(text)
        return cls(Tokenizer.from_str(json.dumps(values["bpe"])), values["vocab_size"], values["text_len"])
