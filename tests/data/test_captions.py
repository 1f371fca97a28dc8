"""Cleaned captions from any value of a caption column."""

from typing import Any

import pytest

from lightning_dalle.data.captions import caption_list


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("a bird\n\n a red bird ", ["a bird", "a red bird"]),
        (["a", None, " ", 7, ["b"]], ["a"]),
        (("a", "a\nb"), ["a", "a b"]),
        (None, []),
        ([], []),
        (7, []),
        (float("nan"), []),
        ({"caption": "a"}, []),
        (b"caf\xc3\xa9", ["café"]),
        (b"a \xff\xfe cat", ["a cat"]),
        ("a \ufffd cat", ["a cat"]),
        ("a\x00cat\x1b[0m\x7f", ["a cat [0m"]),
        (["half \ud83d a pair"], ["half a pair"]),
        (["tab\tand\u00a0space"], ["tab and space"]),
        (["👩\u200d🚀 at work"], ["👩\u200d🚀 at work"]),
        ("\u0000\u0001", []),
    ],
    ids=repr,
)
def test_caption_list_cleans_any_value(value: Any, captions: list[str]) -> None:
    assert caption_list(value) == captions
    assert caption_list(captions) == captions
