"""The tokenizer against the library that it is made of."""

import itertools
import random
from collections import Counter

import pytest

from lightning_dalle.tokenizer import CaptionTokenizer, Drops

CAPTIONS = [
    "man surfing dark skin tone",
    "woman surfing light skin tone",
    "Surfing CAT",
    "a plain cat",
    "türkiye 🐈",
] * 4


@pytest.fixture(scope="module")
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(CAPTIONS, vocab_size=300, text_len=8)


WORDS = [*CAPTIONS[:5], "日本語 & \ttabs", "ﬁne print", "x", "", " ", "surfing" * 9]


def by_hand(tokenizer: CaptionTokenizer, caption: str, drops: Drops) -> list[int]:
    """Every word merged by our own table, none by the library."""
    words = tokenizer.bpe.pre_tokenizer.pre_tokenize_str(tokenizer.bpe.normalizer.normalize_str(caption))
    return [tokenizer._id[token] for word, _ in words for token in tokenizer._merge(tuple(word), drops)]


@pytest.mark.parametrize("caption", WORDS)
def test_our_merges_without_dropout_are_the_librarys(tokenizer: CaptionTokenizer, caption: str) -> None:
    assert by_hand(tokenizer, caption, Drops(1e-12, random.Random(0))) == tokenizer.encode(caption)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9, 1.0])
def test_the_librarys_merges_are_taken_only_where_none_is_dropped(tokenizer: CaptionTokenizer, dropout: float) -> None:
    for seed in range(50):
        ours, all_by_hand = random.Random(seed), random.Random(seed)
        for caption in WORDS:
            wanted = by_hand(tokenizer, caption, Drops(dropout, all_by_hand))
            assert tokenizer.encode(caption, dropout, ours) == wanted
            assert ours.getstate() == all_by_hand.getstate()


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.9, 1.0])
def test_text_survives_any_dropout(tokenizer: CaptionTokenizer, dropout: float) -> None:
    for caption in CAPTIONS:
        assert tokenizer.decode(tokenizer.encode(caption, dropout, random.Random(3))) == caption.lower()


def test_dropout_gives_other_splits_the_same_for_the_same_seed(tokenizer: CaptionTokenizer) -> None:
    def splits(seed: int) -> list[list[int]]:
        rng = random.Random(seed)
        return [tokenizer.encode("man surfing dark skin tone", 0.1, rng) for _ in range(20)]

    assert splits(0) == splits(0) != splits(1)
    assert len({tuple(split) for split in splits(0)}) > 1


def test_dropout_without_randomness_is_refused(tokenizer: CaptionTokenizer) -> None:
    with pytest.raises(ValueError, match="needs a random generator"):
        tokenizer.encode("cat", dropout=0.1)


def test_a_short_caption_is_padded_with_a_pad_for_each_position(tokenizer: CaptionTokenizer) -> None:
    ids, is_cut = tokenizer.pad([1, 2, 3])
    assert ids == [1, 2, 3, 303, 304, 305, 306, 307]
    assert not is_cut


def test_a_long_caption_is_cut_with_one_warning(tokenizer: CaptionTokenizer, recwarn: pytest.WarningsRecorder) -> None:
    for _ in range(3):
        ids, is_cut = tokenizer.pad(list(range(9)))
        assert ids == list(range(8))
        assert is_cut
    (warning,) = recwarn.list
    assert "9 tokens was cut to text_len=8" in str(warning.message)


def test_survives_its_json(tokenizer: CaptionTokenizer) -> None:
    again = CaptionTokenizer.from_json(tokenizer.to_json())
    assert again.to_json() == tokenizer.to_json()
    assert again.encode("surfing cat") == tokenizer.encode("surfing cat")
    assert again.encode("surfing cat", 0.5, random.Random(0)) == tokenizer.encode("surfing cat", 0.5, random.Random(0))


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"255.*256"):
        CaptionTokenizer.train(CAPTIONS, vocab_size=255, text_len=8)


def test_each_merge_is_dropped_with_the_same_probability(tokenizer: CaptionTokenizer) -> None:
    """As Provilkov et al. have it: at every stage each merge is dropped alone, and the best that is left is made."""
    rng = random.Random(0)

    def by_the_book(tokens: list[str]) -> list[str]:
        while ranks := [
            (tokenizer._rank[pair], i)
            for i, pair in enumerate(itertools.pairwise(tokens))
            if pair in tokenizer._rank and rng.random() >= 0.3
        ]:
            _, i = min(ranks)
            tokens = [*tokens[:i], tokens[i] + tokens[i + 1], *tokens[i + 2 :]]
        return tokens

    [(word, _)] = tokenizer.bpe.pre_tokenizer.pre_tokenize_str("woman")
    wanted = Counter(tuple(tokenizer._id[token] for token in by_the_book(list(word))) for _ in range(20_000))
    found = Counter(tuple(tokenizer.encode("woman", 0.3, rng)) for _ in range(20_000))
    assert len(wanted) > 3
    assert sum(abs(found[split] - wanted[split]) for split in wanted | found) / 40_000 < 0.02
