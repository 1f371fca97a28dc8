"""The language filter on labelled web captions, and on emoji names in other languages."""

import csv
from pathlib import Path

import emoji
import pyarrow.parquet as pq
import pytest

from lightning_dalle.data.filters.language import NotEnglish

LABELS = Path(__file__).parent / "laion_languages.tsv"


def test_plain_sentences_are_told_apart_by_language() -> None:
    language = NotEnglish()
    assert not language.rejects_caption("A dog runs on the beach at sunset")
    for other in (
        "Ein Hund läuft bei Sonnenuntergang am Strand",
        "un perro corre por la playa",
        "夕日の浜辺を走る犬",
        "собака",
    ):
        assert language.rejects_caption(other)


def test_short_captions_pass_unless_they_have_a_non_ascii_letter() -> None:
    language = NotEnglish()
    assert not any(map(language.rejects_caption, ["rote Katze", "rote Katze 2012 -400", "IMG 0042", "", "1234"]))
    assert language.rejects_caption("blå kött")
    assert NotEnglish(min_words=2).rejects_caption("rote Katze")


def test_a_caption_is_rejected_only_by_identifier_and_dictionary_together() -> None:
    caption = "Mini Mystic Eye Charm"  # the identifier is sure that this is not English
    assert not NotEnglish().rejects_caption(caption)
    assert NotEnglish(min_known=1.1).rejects_caption(caption)
    assert not NotEnglish(min_known=1.1, min_probability=0.0).rejects_caption(caption)


@pytest.mark.parametrize(
    ("sample", "others", "precision", "recall"), [("chosen on", 43, 0.45, 0.62), ("held out", 18, 0.45, 0.55)]
)
def test_precision_and_recall_on_hand_labelled_web_captions(
    real_data: Path, sample: str, others: int, precision: float, recall: float
) -> None:
    """The rule of the labels is in docs/filters.md. The thresholds were chosen on the first sample."""
    captions = pq.read_table(real_data / "webtext" / "laion_style_10000.parquet")["TEXT"].to_pylist()
    with LABELS.open() as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["sample"] == sample]
    is_other = {int(row["row"]): row["language"] == "other" for row in rows}
    assert sum(is_other.values()) == others
    rejected = [is_other[row] for row in is_other if NotEnglish().rejects_caption(captions[row])]
    assert sum(rejected) / others >= recall
    assert sum(rejected) / len(rejected) >= precision


def test_english_descriptions_are_kept(real_data: Path) -> None:
    lines = (real_data / "webtext" / "cc3m_validation.tsv").read_text().splitlines()[:4000]
    assert sum(NotEnglish().rejects_caption(line.split("\t")[0]) for line in lines) / len(lines) < 0.0005


@pytest.mark.parametrize("language", ["de", "es", "fr", "id", "it", "ru", "zh"])
def test_emoji_names_in_other_languages_are_rejected(language: str) -> None:
    emoji.config.load_language(language)
    names = {entry[language].strip(":").replace("_", " ") for entry in emoji.EMOJI_DATA.values() if language in entry}
    checked = sorted(name for name in names if len(name.split()) > 2 or not name.isascii())[::10]
    assert sum(map(NotEnglish().rejects_caption, checked)) / len(checked) > 0.93
