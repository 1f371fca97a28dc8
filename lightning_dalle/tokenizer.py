"""Captions to token ids: byte-level BPE with BPE dropout and a pad id for each position (paper, section 2.2, B.1).

Knows characters and its own vocabulary. Knows nothing of tensors, images or models.
"""

import itertools
import json
import random
import warnings
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lightning_dalle.errors import UserError


class CaptionTokenizer:
    """Lowercases, splits into bytes, merges by a learned table and pads to `text_len`.

    Ids below `vocab_size` are tokens; `vocab_size + p` is the padding of position p, used only where a caption has
    no token.
    """

    def __init__(self, bpe: Tokenizer, vocab_size: int, text_len: int) -> None:
        self.bpe, self.vocab_size, self.text_len = bpe, vocab_size, text_len
        merges = json.loads(bpe.to_str())["model"]["merges"]
        self._has_warned = False
        self._id = bpe.get_vocab()
        self._rank = {(left, right): rank for rank, (left, right) in enumerate(merges)}

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, text_len: int) -> "CaptionTokenizer":
        """Learns at most `vocab_size` tokens, the 256 bytes among them, from captions.

        Raises:
            UserError: if `vocab_size` leaves no room for the 256 bytes.
        """
        if vocab_size < 256:
            raise UserError(f"vocab_size ({vocab_size}) must be at least 256, one token for each byte")
        bpe = Tokenizer(models.BPE())
        bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        bpe.train_from_iterator(captions, trainer)
        return cls(bpe, vocab_size, text_len)

    def encode(self, caption: str, dropout: float = 0.0, rng: random.Random | None = None) -> list[int]:
        """The ids of a caption, without padding and whatever their number.

        Args:
            caption: any text.
            dropout: probability with which a merge is passed over (Provilkov et al. 2020); 0.1 in the paper's training.
            rng: its randomness. The library's own dropout cannot be seeded, so a resumed run could not repeat it.
        """
        if not dropout:
            return self.bpe.encode(caption).ids
        if rng is None:
            raise UserError(f"a dropout of {dropout} needs a random generator")
        assert self.bpe.normalizer is not None
        assert self.bpe.pre_tokenizer is not None
        words = self.bpe.pre_tokenizer.pre_tokenize_str(self.bpe.normalizer.normalize_str(caption))
        return [self._id[token] for word, _ in words for token in self._merge(list(word), dropout, rng)]

    def _merge(self, tokens: list[str], dropout: float, rng: random.Random) -> list[str]:
        """Applies the best merge that is not dropped, until none is left."""
        while True:
            ranks = [
                (self._rank[pair], i)
                for i, pair in enumerate(itertools.pairwise(tokens))
                if pair in self._rank and rng.random() >= dropout
            ]
            if not ranks:
                return tokens
            _, i = min(ranks)
            tokens[i : i + 2] = [tokens[i] + tokens[i + 1]]

    def pad(self, ids: list[int]) -> tuple[list[int], bool]:
        """Exactly `text_len` ids, and whether some had to be cut off; the first cut warns."""
        is_cut = len(ids) > self.text_len
        if is_cut and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"a caption of {len(ids)} tokens was cut to text_len={self.text_len}; "
                "training counts them all as data/captions_cut",
                stacklevel=2,
            )
        ids = ids[: self.text_len]
        return ids + [self.vocab_size + position for position in range(len(ids), self.text_len)], is_cut

    def decode(self, ids: list[int]) -> str:
        """The text of ids; padding is passed over."""
        return self.bpe.decode([i for i in ids if i < self.vocab_size]).strip()

    def to_json(self) -> str:
        """Everything about this tokenizer, as a checkpoint keeps it."""
        return json.dumps(
            {"bpe": json.loads(self.bpe.to_str()), "vocab_size": self.vocab_size, "text_len": self.text_len},
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> "CaptionTokenizer":
        """Inverse of `to_json`."""
        values = json.loads(text)
        return cls(Tokenizer.from_str(json.dumps(values["bpe"])), values["vocab_size"], values["text_len"])
