"""Tokenizer: BPE dropout against the tokenizers library and the paper of BPE dropout, padding, JSON."""

import itertools
import random
from collections import Counter

import pytest

from lightning_dalle.tokenizer import CaptionTokenizer

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


@pytest.mark.parametrize("caption", WORDS)
def test_merges_with_negligible_dropout_equal_the_librarys(tokenizer: CaptionTokenizer, caption: str) -> None:
    assert tokenizer.encode(caption, 1e-12, random.Random(0)) == tokenizer.encode(caption)


@pytest.mark.parametrize("caption", WORDS)
def test_a_dropout_of_1_leaves_single_bytes(tokenizer: CaptionTokenizer, caption: str) -> None:
    tokens = [tokenizer.bpe.id_to_token(i) for i in tokenizer.encode(caption, 1.0, random.Random(0))]
    assert all(len(token) == 1 for token in tokens)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9, 1.0])
def test_the_rng_alone_decides_the_tokens(tokenizer: CaptionTokenizer, dropout: float) -> None:
    """Resuming is exact only if the ids depend on nothing that an earlier caption left behind in the tokenizer."""
    fresh = CaptionTokenizer.from_json(tokenizer.to_json())
    for seed in range(50):
        first, second = random.Random(seed), random.Random(seed)
        assert [tokenizer.encode(caption, dropout, first) for caption in WORDS] == [
            fresh.encode(caption, dropout, second) for caption in WORDS
        ]
        assert first.getstate() == second.getstate()


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.9, 1.0])
def test_text_survives_any_dropout(tokenizer: CaptionTokenizer, dropout: float) -> None:
    for caption in CAPTIONS:
        assert tokenizer.decode(tokenizer.encode(caption, dropout, random.Random(3))) == caption.lower()


def test_dropout_varies_the_tokens_reproducibly(tokenizer: CaptionTokenizer) -> None:
    def splits(seed: int) -> list[list[int]]:
        rng = random.Random(seed)
        return [tokenizer.encode("man surfing dark skin tone", 0.1, rng) for _ in range(20)]

    assert splits(0) == splits(0) != splits(1)
    assert len({tuple(split) for split in splits(0)}) > 1


def test_dropout_without_a_generator_is_refused(tokenizer: CaptionTokenizer) -> None:
    with pytest.raises(ValueError, match=r"dropout is 0\.1, which needs a random generator: give rng"):
        tokenizer.encode("cat", dropout=0.1)


def test_a_short_caption_is_padded_with_one_id_per_position(tokenizer: CaptionTokenizer) -> None:
    ids, is_truncated = tokenizer.pad([1, 2, 3])
    assert ids == [1, 2, 3, 303, 304, 305, 306, 307]
    assert not is_truncated


def test_a_long_caption_is_truncated_with_one_warning(
    tokenizer: CaptionTokenizer, recwarn: pytest.WarningsRecorder
) -> None:
    for _ in range(3):
        ids, is_truncated = tokenizer.pad(list(range(9)))
        assert ids == list(range(8))
        assert is_truncated
    (warning,) = recwarn.list
    assert "9 tokens was truncated to data.text_len=8" in str(warning.message)


def test_json_restores_the_tokenizer(tokenizer: CaptionTokenizer) -> None:
    again = CaptionTokenizer.from_json(tokenizer.to_json())
    assert again.to_json() == tokenizer.to_json()
    assert again.encode("surfing cat") == tokenizer.encode("surfing cat")
    assert again.encode("surfing cat", 0.5, random.Random(0)) == tokenizer.encode("surfing cat", 0.5, random.Random(0))


def test_a_vocabulary_below_256_is_refused() -> None:
    with pytest.raises(ValueError, match=r"255.*256"):
        CaptionTokenizer.train(CAPTIONS, vocab_size=255, text_len=8)


def test_each_merge_is_dropped_with_the_same_probability(tokenizer: CaptionTokenizer) -> None:
    """Check the definition of Provilkov et al.: drop each possible merge independently, then apply the best left."""
    rng = random.Random(0)

    def reference_merge(tokens: list[str]) -> list[str]:
        while ranks := [
            (tokenizer._rank[pair], i)
            for i, pair in enumerate(itertools.pairwise(tokens))
            if pair in tokenizer._rank and rng.random() >= 0.3
        ]:
            _, i = min(ranks)
            tokens = [*tokens[:i], tokens[i] + tokens[i + 1], *tokens[i + 2 :]]
        return tokens

    [(word, _)] = tokenizer.bpe.pre_tokenizer.pre_tokenize_str("woman")
    expected = Counter(tuple(tokenizer._id[token] for token in reference_merge(list(word))) for _ in range(20_000))
    found = Counter(tuple(tokenizer.encode("woman", 0.3, rng)) for _ in range(20_000))
    assert len(expected) > 3
    assert sum(abs(found[split] - expected[split]) for split in expected | found) / 40_000 < 0.02
