"""Filters of captions and image sizes, chosen by class name in YAML (paper, section 2.3 and appendix C)."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from lightning_dalle.errors import UserError


@runtime_checkable
class CaptionFilter(Protocol):
    """Interface of a filter that checks each caption of a record alone."""

    reason: ClassVar[str]
    """Name under which rejections are counted."""

    def rejects_caption(self, caption: str) -> bool: ...


@runtime_checkable
class ImageFilter(Protocol):
    """Interface of a filter that checks the width and height of an image, in pixels."""

    reason: ClassVar[str]

    def rejects_image(self, width: int, height: int) -> bool: ...


@runtime_checkable
class RecordFilter(Protocol):
    """Interface of a filter that checks a whole record."""

    reason: ClassVar[str]

    def rejects_record(self, record: Mapping[str, Any]) -> bool: ...


Filter = CaptionFilter | ImageFilter | RecordFilter


@dataclass(frozen=True, kw_only=True)
class TooShort:
    """Filter that rejects captions with few words or characters; the paper gives no threshold."""

    reason: ClassVar[str] = "caption too short"

    min_words: int = 3
    """Fewest words that pass. Words are separated by spaces and contain a letter."""
    min_characters: int = 10
    """Fewest characters that pass, including spaces."""

    def rejects_caption(self, caption: str) -> bool:
        words = sum(any(map(str.isalpha, word)) for word in caption.split())
        return words < self.min_words or len(caption) < self.min_characters


@dataclass(frozen=True, kw_only=True)
class TooLong:
    """Filter that rejects long captions, because the tokenizer truncates them."""

    reason: ClassVar[str] = "caption too long"

    max_characters: int = 1000
    """Most characters that pass. 256 tokens hold about 1,100 characters of English."""

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
"""Regular expressions of captions that do not describe an image, such as dates, credits and file names."""


@dataclass(frozen=True, kw_only=True)
class Boilerplate:
    """Filter that rejects captions which describe no image, such as "taken on 4 May 2012", "IMG_0042.jpg" or "logo"."""

    reason: ClassVar[str] = "boilerplate"

    patterns: tuple[str, ...] = BOILERPLATE
    """Regular expressions. A caption is rejected if it matches one as a whole, in upper or lower case."""

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"correct the patterns of Boilerplate: {pattern!r} is invalid, {error}") from error

    def rejects_caption(self, caption: str) -> bool:
        any_pattern = "|".join(f"(?:{pattern})" for pattern in self.patterns)  # `re` caches the compiled expression
        return re.fullmatch(any_pattern, caption, re.IGNORECASE) is not None


@dataclass(frozen=True, kw_only=True)
class AspectRatio:
    """Filter that rejects wide and tall images (paper, appendix C: width / height outside [1/2, 2])."""

    reason: ClassVar[str] = "aspect ratio"

    max_ratio: float = 2.0
    """Largest ratio of the longer side to the shorter that passes."""

    def rejects_image(self, width: int, height: int) -> bool:
        return max(width, height) > self.max_ratio * min(width, height)


@dataclass(frozen=True, kw_only=True)
class TooSmall:
    """Filter that rejects small images, because training would enlarge them."""

    reason: ClassVar[str] = "image too small"

    min_side: int
    """Fewest pixels of the shorter side that pass, usually data.image_size."""

    def rejects_image(self, width: int, height: int) -> bool:
        return min(width, height) < self.min_side


@dataclass(frozen=True, kw_only=True)
class DuplicateCaptions:
    """Filter that rejects captions that more than `max_count` records of a split share.

    Captions of rows on disk are counted before training. Streamed data needs a file of counts.
    """

    reason: ClassVar[str] = "duplicate caption"

    max_count: int = 10
    """Most records that may share a caption, ignoring upper and lower case."""
    file: Path | None = None
    """JSON file of counts that `data report --caption_counts FILE` writes. If not given, rows on disk are counted."""

    def rejects_caption(self, caption: str) -> bool:
        return caption.casefold() in self.counts

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of records by lower-case caption, for captions of more than `max_count` records."""
        if self.file is None:
            raise UserError(
                "the filter DuplicateCaptions cannot count streamed data: run `data report --caption_counts FILE` and "
                "set the filter's file to FILE"
            )
        try:
            found = json.loads(self.file.read_text())
            counted_above, counts = int(found["more_than"]), dict(found["captions"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"cannot read caption counts from {self.file} ({error!r}); run `data report --caption_counts "
                f"{self.file}` to write them"
            ) from error
        if counted_above > self.max_count:
            raise UserError(
                f"{self.file} lists only captions that occur in more than {counted_above} records, but the filter's "
                f"max_count is {self.max_count}: raise max_count to {counted_above}, or run `data report "
                f"--caption_counts {self.file}` with max_count {self.max_count} in its config"
            )
        return {caption: count for caption, count in counts.items() if count > self.max_count}

    def counted(self, captions_of_records: Iterable[Sequence[str]]) -> "DuplicateCaptions":
        """Return this filter with the counts of the given records in place of those in `file`."""
        counts = Counter(caption for captions in captions_of_records for caption in {c.casefold() for c in captions})
        counted = replace(self)
        # Sorted, so that every process pickles and caches the filter alike.
        vars(counted)["counts"] = {text: count for text, count in sorted(counts.items()) if count > self.max_count}
        return counted
