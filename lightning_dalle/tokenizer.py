"""Captions to token ids: byte-level BPE with BPE dropout and a pad id for each position (paper, section 2.2, B.1).

Knows characters and its own vocabulary. Knows nothing of tensors, images or models.
"""

import itertools
import json
import math
import random
import warnings
from collections.abc import Iterable
from operator import itemgetter

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lightning_dalle.errors import UserError

Tokens = tuple[str, ...]
"""Of a word."""

LONGEST_REMEMBERED, MOST_REMEMBERED = 32, 20_000
"""Tokens of a word, and words, whose merges are looked for once: words come again. Some 20 MB, most being short."""


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
        self._remembered: dict[Tokens, list[Tokens]] = {}

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
        drops = Drops(dropout, rng)
        ids: list[int] = []
        found = self.bpe.encode(caption)  # with no merge dropped, which is what most words are left with
        for _, word in itertools.groupby(zip(found.word_ids, found.tokens, found.ids, strict=True), itemgetter(0)):
            _, tokens, ids_of_word = zip(*word, strict=True)
            letters = tuple("".join(tokens))
            if drops.spare_all(len(letters) - len(tokens)):  # each merge made one of two
                ids += ids_of_word
            else:
                ids += [self._id[token] for token in self._merge(letters, drops)]
        return ids

    def _merge(self, tokens: Tokens, drops: "Drops") -> Tokens:
        """Applies the best merge that is not dropped, until none is left."""
        while True:
            stages = self._stages(tokens)
            tokens = stages[drops.spare(len(stages) - 1)]
            if tokens is stages[-1]:
                return tokens
            others = self._merges(tokens)[1:]  # the best was dropped
            i = next((i for i in others if drops.spare(1)), None)
            if i is None:
                return tokens
            tokens = _merged(tokens, i)

    def _stages(self, tokens: Tokens) -> list[Tokens]:
        """A word as it is after 0, 1, 2, ... merges, each the best that there is."""
        if tokens not in self._remembered:
            stages = [tokens]
            while merges := self._merges(stages[-1]):
                stages.append(_merged(stages[-1], merges[0]))
            if len(tokens) > LONGEST_REMEMBERED or len(self._remembered) >= MOST_REMEMBERED:
                return stages
            self._remembered[tokens] = stages
        return self._remembered[tokens]

    def _merges(self, tokens: Tokens) -> list[int]:
        """Where two of a word's tokens can become one, the best first."""
        pairs = enumerate(itertools.pairwise(tokens))
        return [i for _, i in sorted((self._rank[pair], i) for i, pair in pairs if pair in self._rank)]

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


class Drops:
    """Which merges are dropped: each with the same probability. Draws one random number a drop rather than a merge."""

    def __init__(self, probability: float, rng: random.Random) -> None:
        self.probability, self.rng = probability, rng
        self.left = self._geometric()

    def spare(self, merges: int) -> int:
        """How many of the next merges come before one that is dropped; all of them, if none is."""
        if self.spare_all(merges):
            return merges
        spared, self.left = self.left, self._geometric()
        return spared

    def spare_all(self, merges: int) -> bool:
        """Whether the next merges all come before one that is dropped; if not, they are still to come."""
        if merges > self.left:
            return False
        self.left -= merges
        return True

    def _geometric(self) -> int:
        if self.probability >= 1:
            return 0
        return int(math.log(1 - self.rng.random()) / math.log1p(-self.probability))


def _merged(tokens: Tokens, i: int) -> Tokens:
    return (*tokens[:i], tokens[i] + tokens[i + 1], *tokens[i + 2 :])
