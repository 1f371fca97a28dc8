"""Rejections of web captions by each filter, and precision and recall of the language filter (docs/filters.md).

    uv run python evals/caption_filters.py ../shared/data

Reads webtext/laion_style_10000.parquet, webtext/cc3m_validation.tsv and coco/captions_val2017.json.
"""

import csv
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import emoji
import pyarrow.parquet as pq

from lightning_dalle.data.captions import caption_list
from lightning_dalle.data.filters.language import NotEnglish
from lightning_dalle.data.filters.rules import Boilerplate, DuplicateCaptions, TooShort
from lightning_dalle.evaluation.statistics import proportion_of

LABELS = Path(__file__).parents[1] / "tests" / "data" / "filters" / "laion_languages.tsv"
LANGUAGES = ("en", "de", "es", "fr", "it", "pt", "id", "tr", "ru", "fa", "ar", "ko", "ja", "zh")
FILTERS = (Boilerplate(), TooShort(), NotEnglish(), DuplicateCaptions())


def captions(folder: Path) -> dict[str, list[str]]:
    """Read one cleaned caption per record, empty if the record has none."""
    found = {
        "LAION": pq.read_table(folder / "webtext/laion_style_10000.parquet")["TEXT"].to_pylist(),
        "CC3M validation": [
            line.split("\t")[0] for line in (folder / "webtext/cc3m_validation.tsv").read_text().splitlines()
        ],
        "COCO val2017": [
            entry["caption"] for entry in json.loads((folder / "coco/captions_val2017.json").read_text())["annotations"]
        ],
    }
    return {name: [" ".join(caption_list([text])) for text in texts] for name, texts in found.items()}


def names(language: str) -> list[str]:
    """Return the distinct names of emoji in a language, for emoji that have a name in all `LANGUAGES`."""
    emoji.config.load_language(list(LANGUAGES))
    entries = [entry for entry in emoji.EMOJI_DATA.values() if all(wanted in entry for wanted in LANGUAGES)]
    return sorted({entry[language].strip(":").replace("_", " ") for entry in entries})


def filter_table(sets: dict[str, list[str]]) -> None:
    """Print how many records each filter rejects first."""
    print("| rejected |", " | ".join(sets), "|\n|---|" + "---|" * len(sets))
    counts = {}
    for name, texts in sets.items():
        filters = (*FILTERS[:-1], DuplicateCaptions().counted([text] for text in texts))
        counts[name] = Counter(
            "missing caption" if not text else next((f.reason for f in filters if f.rejects_caption(text)), "kept")
            for text in texts
        )
    for reason in ("missing caption", *(known.reason for known in FILTERS), "kept"):
        cells = [f"{c[reason]:,} ({c[reason] / c.total():.1%})" for c in counts.values()]
        print("|", reason, "|", " | ".join(cells), "|")
    print("| records |", " | ".join(f"{c.total():,}" for c in counts.values()), "|\n")


def language_table(sets: dict[str, list[str]]) -> None:
    """Print precision and recall of NotEnglish on labelled captions, and the fraction of English sets it rejects."""
    with LABELS.open() as file:
        labels = list(csv.DictReader(file, delimiter="\t"))
    print("| min_probability, min_known | sample | precision | recall | English lost | CC3M lost | COCO lost |")
    print("|---|---|---|---|---|---|---|")
    for rule in (NotEnglish(), NotEnglish(min_probability=0.5), NotEnglish(min_known=0.6), NotEnglish(min_known=2)):
        lost = [proportion_of(sum(map(rule.rejects_caption, sets[name])), len(sets[name])) for name in list(sets)[1:]]
        for sample in ("chosen on", "held out"):
            rows = [row for row in labels if row["sample"] == sample]
            others = sum(row["language"] == "other" for row in rows)
            rejected = [row for row in rows if rule.rejects_caption(sets["LAION"][int(row["row"])])]
            hits = sum(row["language"] == "other" for row in rejected)
            measures = [proportion_of(hits, len(rejected)), proportion_of(hits, others)]
            measures += [proportion_of(len(rejected) - hits, len(rows) - others), *lost]
            print(f"| {rule.min_probability}, {rule.min_known} | {sample} |", " | ".join(map(cell, measures)), "|")


def cell(measure: dict[str, Any]) -> str:
    """Format a proportion with its 95 % interval and counts."""
    low, high = measure["ci95"]
    return f"{measure['value']:.1%} ({low:.0%} to {high:.0%}; {measure['hits']} of {measure['of']})"


def names_table() -> None:
    """Print the fraction of emoji names that NotEnglish rejects, by language and length."""
    print("\n| language | rejected of 3 words and more | rejected of 1 or 2 words |\n|---|---|---|")
    for language in LANGUAGES:
        cells = []
        for is_long in (True, False):
            some = [name for name in names(language) if (len(name.split()) > 2) == is_long]
            rejected = sum(map(NotEnglish().rejects_caption, some)) / max(len(some), 1)
            cells.append(f"{rejected:.1%} of {len(some):,}")
        print("|", language, "|", " | ".join(cells), "|")


if __name__ == "__main__":
    found = captions(Path(sys.argv[1]))
    filter_table(found)
    language_table(found)
    names_table()
