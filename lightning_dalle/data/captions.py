"""Conversion of any value of a caption column into a list of clean captions."""

import unicodedata
from typing import Any

MAX_CAPTION_CHARACTERS = 2000
"""Most characters of a caption. Longer texts are usually whole pages; 256 tokens hold about 1,100 characters."""

_REPLACEMENTS = {"Cc": " ", "Cs": ""}
"""Replacements of control characters (Cc) and surrogates (Cs). Format characters (Cf), which join emoji, are kept."""


def caption_list(value: Any) -> list[str]:
    """Return the cleaned captions of a caption column's value, an empty list if there are none.

    A string, or bytes of UTF-8, contains one caption per line. Each string in a list is one caption. None, numbers and
    other types contain no caption. Invalid UTF-8, replacement characters and unpaired surrogates are removed. Control
    characters and any white space become a single space between words.
    """
    texts = _text(value).splitlines() or (value if isinstance(value, list | tuple) else [])
    return [caption for text in texts if (caption := _clean(_text(text)))]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="ignore")
    return value if isinstance(value, str) else ""


def _clean(text: str) -> str:
    text = text.replace("\ufffd", "")
    if not text.isprintable():  # rare: the loop over characters is slow
        text = "".join(_REPLACEMENTS.get(unicodedata.category(character), character) for character in text)
    return " ".join(text.split())
