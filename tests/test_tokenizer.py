"""Tokenizer: BPE dropout and extension against the tokenizers library and their definitions, padding, JSON."""

import itertools
import json
import random
from collections import Counter
from typing import Any

import pytest

from lightning_dalle.errors import UserError
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


NEW_CAPTIONS = [
    "a banana split with anana and bananas", "türkiyeli kedi", "mmmmm mmm mmmm", "cat and catamaran and catapult",
    "surfing snowboarder", "surfer surfers surfing snowboards", "a snowboard on the snow", "日本語 日本語",
]  # fmt: skip


def model(tokenizer: CaptionTokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.bpe.to_str())["model"]


@pytest.mark.parametrize("vocab_size", [257, 270, 300])
def test_extending_the_bytes_equals_training(vocab_size: int) -> None:
    captions = CAPTIONS + NEW_CAPTIONS * 2
    extended = CaptionTokenizer.train([], vocab_size=256, text_len=8).extend(captions, vocab_size)
    assert extended.to_json() == CaptionTokenizer.train(captions, vocab_size, text_len=8).to_json()


def test_extension_repeats_the_most_frequent_merge(tokenizer: CaptionTokenizer) -> None:
    """Compare with BPE that counts all pairs again after each merge."""
    old_size = tokenizer.bpe.get_vocab_size()
    tokens = sorted(tokenizer._id, key=tokenizer._id.__getitem__)
    texts = [
        [token.id for token in tokenizer.bpe.model.tokenize(word)]
        for caption in NEW_CAPTIONS
        for word in tokenizer._words(caption)
    ]
    while True:
        counts = Counter(pair for text in texts for pair in itertools.pairwise(text))
        pairs = [(-count, pair) for pair, count in counts.items() if count > 1]
        pairs = [(count, (a, b)) for count, (a, b) in pairs if tokens[a] + tokens[b] not in tokens]
        if not pairs:
            break
        _, (left, right) = min(pairs)
        for text in texts:
            for i in range(len(text)):
                if text[i : i + 2] == [left, right]:
                    text[i : i + 2] = [len(tokens)]
        tokens.append(tokens[left] + tokens[right])

    extended = tokenizer.extend(NEW_CAPTIONS, vocab_size=1000)
    assert model(extended)["vocab"] == {token: i for i, token in enumerate(tokens)}
    assert len(tokens) > old_size + 20
    assert [i for caption in NEW_CAPTIONS for i in extended.encode(caption)] == [i for text in texts for i in text]


def test_extension_keeps_the_old_tokens_and_moves_the_paddings(tokenizer: CaptionTokenizer) -> None:
    extended = tokenizer.extend(NEW_CAPTIONS, vocab_size=310)
    old, new = model(tokenizer), model(extended)
    assert new["merges"][: len(old["merges"])] == old["merges"]
    assert {token: i for token, i in new["vocab"].items() if i < len(old["vocab"])} == old["vocab"]
    assert len(new["vocab"]) == 310 > len(old["vocab"])
    assert extended.pad([1, 2, 3])[0] == [1, 2, 3, 313, 314, 315, 316, 317]
    for caption in NEW_CAPTIONS:
        ids = extended.encode(caption)
        assert extended.decode(ids) == caption
        assert len(ids) <= len(tokenizer.encode(caption))
        assert extended.encode(caption, 1e-12, random.Random(0)) == ids


def test_extension_makes_no_token_of_a_pair_that_occurs_once(tokenizer: CaptionTokenizer) -> None:
    extended = tokenizer.extend(["qz qzw", "vj"], vocab_size=400)
    assert extended.bpe.get_vocab_size() - tokenizer.bpe.get_vocab_size() == 2  # "qz" and " qz"
    assert extended.vocab_size == 400
    assert tokenizer.extend([], vocab_size=300).to_json() == tokenizer.to_json()


def test_extension_to_a_smaller_vocabulary_is_refused(tokenizer: CaptionTokenizer) -> None:
    with pytest.raises(UserError, match=r"vocab_size is 299, but must be at least the tokenizer's 300"):
        tokenizer.extend(NEW_CAPTIONS, vocab_size=299)


def test_extension_by_a_merge_that_forms_a_known_token_adds_none() -> None:
    state = json.loads(CaptionTokenizer.train([], vocab_size=256, text_len=8).to_json())
    state["bpe"]["model"]["vocab"] |= {token: 256 + i for i, token in enumerate(["ab", "cd", "abc", "abcd"])}
    state["bpe"]["model"]["merges"] = [["a", "b"], ["c", "d"], ["ab", "c"], ["abc", "d"]]
    tokenizer = CaptionTokenizer.from_json(json.dumps(state | {"vocab_size": 260}))
    assert tokenizer.encode("xabcd")[2:] == [256, 257]
    extended = tokenizer.extend(["xabcd", "yabcd"], vocab_size=270)
    assert extended.encode("xabcd")[2:] == [259]
    assert extended.bpe.get_vocab_size() == 260
