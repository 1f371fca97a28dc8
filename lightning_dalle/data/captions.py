"""What of a caption's column is text: the one place that cleans what strangers have written.

Knows characters. Knows nothing of languages, filters or where captions come from.
"""

import unicodedata
from collections.abc import Iterator
from typing import Any

LONGEST = 2000
"""Characters of the longest caption. 256 tokens hold about 1,100 of English; what is longer than this is a page."""


def caption_list(value: Any) -> list[str]:
    """Captions as they are written down, cleaned, as a list that may be empty.

    A text, or bytes of UTF-8, holds a caption on each line; of a list each element is one. None, numbers and all else
    are no captions. Bytes that are no UTF-8, the marks that others leave in their place, and halves of surrogate pairs
    are lost; control characters and any white space become one space between words.
    """
    texts = _text(value).splitlines() if isinstance(value, str | bytes) else map(_text, _elements(value))
    return [caption for caption in map(_clean, texts) if caption]


def _elements(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, list | tuple) else ()


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="ignore")
    return value if isinstance(value, str) else ""


def _clean(text: str) -> str:
    """Control characters are spaces, surrogates nothing; what joins letters and emoji (category Cf) is kept."""
    text = text.replace("\ufffd", "")
    if not text.isprintable():  # few captions have any, and looking at each character is slow
        text = "".join(_PLAIN.get(unicodedata.category(character), character) for character in text)
    return " ".join(text.split())


_PLAIN = {"Cc": " ", "Cs": ""}
