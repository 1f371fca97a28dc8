"""Which records are worth training on, as predicates that are named in YAML (paper, section 2.3 and appendix C).

Knows captions and the width and height of pictures. Knows nothing of where records come from or what becomes of them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from lightning_dalle.errors import UserError


@runtime_checkable
class CaptionFilter(Protocol):
    """Judges captions, one by one."""

    reason: ClassVar[str]
    """What a rejection is counted under."""

    def rejects_caption(self, caption: str) -> bool: ...


@runtime_checkable
class PictureFilter(Protocol):
    """Judges pictures by their width and height in pixels."""

    reason: ClassVar[str]

    def rejects_picture(self, width: int, height: int) -> bool: ...


@runtime_checkable
class RecordFilter(Protocol):
    """Judges records by anything that they hold."""

    reason: ClassVar[str]

    def rejects_record(self, record: Mapping[str, Any]) -> bool: ...


Filter = CaptionFilter | PictureFilter | RecordFilter


@dataclass(frozen=True, kw_only=True)
class TooShort:
    """Captions of few words or characters; the paper gives no number."""

    reason: ClassVar[str] = "caption too short"

    min_words: int = 3
    """Fewest words; a word is what stands between spaces and has a letter in it."""
    min_characters: int = 10
    """Fewest characters, spaces among them."""

    def rejects_caption(self, caption: str) -> bool:
        words = sum(any(map(str.isalpha, word)) for word in caption.split())
        return words < self.min_words or len(caption) < self.min_characters


@dataclass(frozen=True, kw_only=True)
class TooLong:
    """Captions of many characters, of which the transformer would read the beginning alone."""

    reason: ClassVar[str] = "caption too long"

    max_characters: int = 1000
    """Most characters; 256 tokens hold about 1,100."""

    def rejects_caption(self, caption: str) -> bool:
        return len(caption) > self.max_characters


_MONTH = "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_DATE = (
    rf"(?:(?:\w+day,? )?(?:{_DAY} (?:of )?{_MONTH}|{_MONTH} {_DAY}),?(?: \d{{4}})?|{_MONTH},? \d{{4}}"
    r"|\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}|\d{4})"
)
_MADE = r"(?:photo(?:graph)?ed|taken|shot|captured|uploaded|posted|published|created|added|scanned|dated|recorded)"
_PICTURE = r"(?:photo(?:graph)?|picture|image|pic|img|video|slide|page|figure|thumbnail|screenshot|logo|icon|banner)"

BOILERPLATE = (
    rf"(?:{_PICTURE}s? )?(?:was )?{_MADE}(?: on| in| at)?:? {_DATE}.{{0,20}}",
    rf"{_PICTURE}s?(?: from| of| on)? {_DATE}",
    rf"{_PICTURE}s? ?#?\d*(?: (?:of|/) \d+)?",
    rf"{_PICTURE}s? (?:by|credits?|courtesy(?: of)?|source|via)\b[^:]{{0,40}}",
    rf"(?:no|missing|default|placeholder)[ _-]{_PICTURE}(?: available| found)?",
    rf"{_PICTURE} (?:not found|unavailable|loading|coming soon).*",
    r"(?:please )?(?:click|tap)(?: here)?(?: on (?:the )?image)? (?:to|for) .*",
    r"(?:view|see|open|zoom) (?:full|larger|large|original|more) ?(?:size|image|photo|picture|version)s?.*",
    r"(?:royalty[- ]free |free )?stock (?:photo|image|picture|illustration|vector|footage|video)s?(?: #?\d+)?",
    r"(?:©|\(c\)|copyright)(?: |\d)[^.]{0,40}\.?",
    r"(?:all rights reserved|untitled|unnamed|advertisement|share this|read more|loading)\.*",
    r"(?:https?://|www\.)\S+",
    r"[^\s/]+\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg)",
    rf"(?:dscn?|dscf|pict|p|{_PICTURE})[-_ ]?\d[\d_ -]*(?:\(\d+\))?",
    r"[\W\d_]+",
)
"""Regular expressions of captions that say nothing of what is seen: photographed on a date, credits, names of files."""


@dataclass(frozen=True, kw_only=True)
class Boilerplate:
    """Captions that could stand below any picture: "photographed on 4 May 2012", "IMG_0042.jpg", "click to enlarge"."""

    reason: ClassVar[str] = "boilerplate"

    patterns: tuple[str, ...] = BOILERPLATE
    """Regular expressions, one of which the whole caption matches, in whatever case."""

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"the boilerplate {pattern!r} is no regular expression: {error}") from error

    def rejects_caption(self, caption: str) -> bool:
        return _any_of(self.patterns).fullmatch(caption) is not None


@cache
def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class AspectRatio:
    """Pictures that are long or tall (paper, appendix C: outside [1/2, 2])."""

    reason: ClassVar[str] = "aspect ratio"

    largest: float = 2.0
    """Of the longer side to the shorter."""

    def rejects_picture(self, width: int, height: int) -> bool:
        return max(width, height) > self.largest * min(width, height)


@dataclass(frozen=True, kw_only=True)
class TooSmall:
    """Pictures that would have to be enlarged."""

    reason: ClassVar[str] = "picture too small"

    min_side: int
    """Fewest pixels of the shorter side; the image_size is a good one."""

    def rejects_picture(self, width: int, height: int) -> bool:
        return min(width, height) < self.min_side


@dataclass(frozen=True, kw_only=True)
class CaptionFlood:
    """Captions that so many pictures share that they tell none from another; all of them go, whatever their order.

    How often a caption occurs is counted once for the whole split, or read from a file, which streamed data need.
    """

    reason: ClassVar[str] = "caption flood"

    max_count: int = 10
    """Most records that may have the same caption, upper and lower case being one."""
    file: Path | None = None
    """The counts, as `data report --floods FILE` writes them; if not given, the split itself is counted."""

    def rejects_caption(self, caption: str) -> bool:
        return self.floods.rejects_caption(caption)

    @cached_property
    def floods(self) -> "Floods":
        """Of the file.

        Raises:
            UserError: if there is none, or it is not of `data report`, or leaves out what this filter would reject.
        """
        if self.file is None:
            raise UserError(
                "a caption flood is told by counts of the whole data, but streamed data are counted nowhere: let "
                "`data report --floods FILE` write the counts, and name the filter's file"
            )
        try:
            found = json.loads(self.file.read_text())
            above, counts = int(found["more_than"]), dict(found["captions"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.file} holds no counts of captions, as `data report` writes them: {error}"
            ) from error
        if above > self.max_count:
            raise UserError(
                f"captions of more than {self.max_count} records are to be rejected, but {self.file} counts those of "
                f"more than {above} alone"
            )
        return Floods.of(counts, self.max_count)


@dataclass(frozen=True)
class Floods:
    """Captions that are known to be too many."""

    reason: ClassVar[str] = CaptionFlood.reason

    counts: dict[str, int]
    """Of each, in alphabetical order, so that it is pickled alike in every process."""

    @classmethod
    def of(cls, counts: Mapping[str, int], max_count: int) -> "Floods":
        return cls({caption: count for caption, count in sorted(counts.items()) if count > max_count})

    def rejects_caption(self, caption: str) -> bool:
        return caption.casefold() in self.counts


def count_captions(captions_of_records: Iterable[Sequence[str]]) -> Counter[str]:
    """In how many records each caption stands, lowercased."""
    return Counter(caption for captions in captions_of_records for caption in {c.casefold() for c in captions})
