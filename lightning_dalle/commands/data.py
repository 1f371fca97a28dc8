"""`data report`: what is in the data, and what each filter costs, before anything is trained.

Knows configs and where reports are written.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_dalle.errors import UserError
from lightning_dalle.files import read_yaml, write_text
from lightning_dalle.provenance import commit

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from rich.table import Table

    from lightning_dalle.data.datamodule import CaptionedImageDataModule
    from lightning_dalle.data.filters.pipeline import Screening


def report(
    config: Path,
    data: dict[str, Any] | None = None,
    limit: int | None = None,
    out: Path | None = None,
    floods: Path | None = None,
) -> None:
    """Print how many records of each split every filter rejects, with one of them, and how many are kept.

    Every picture is decoded once. Splits that are not streamed are screened as a fit screens them, which then finds the
    verdicts in the cache.

    Args:
        config: of a fit, or the keys of its data alone.
        data: keys of the data to set otherwise, such as `--data.source.init_args.path my/pictures`.
        limit: most records of each split to look at, its first ones; streamed data may have no end.
        out: file for the counts as JSON.
        floods: file for the captions that more records of the split train share than the filter CaptionFlood lets
            pass, with their counts: streamed data are filtered by it.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}, but at least 1 record must be looked at")
    datamodule = read_datamodule(config, data or {})

    from rich.console import Console

    from lightning_dalle.data.filters.pipeline import Screening

    screening = Screening(datamodule.filters or ())
    splits = datamodule.source.load(datamodule.image_size)
    if any("codes" in rows.column_names for rows in splits.values()):
        raise UserError(f"the data of {config} are codes, whose pictures were screened before they were encoded")
    if floods is not None:
        write_floods(floods, splits, limit, screening)
    counted = {name: count(rows, limit, screening) for name, rows in splits.items()}
    Console().print(table(counted, screening))
    if out is not None:
        result = {
            "config": str(config),
            "limit": limit,
            "filters": [repr(judge) for judge in screening.filters],
            "splits": {
                name: {
                    "records": found.records,
                    "rejected": dict(found.rejected),
                    "kept": found.kept,
                    "examples": found.examples,
                }
                for name, found in counted.items()
            },
            "commit": commit(),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(result, indent=2) + "\n")
        print(f"written to {out}")


def read_datamodule(config: Path, overrides: dict[str, Any]) -> "CaptionedImageDataModule":
    """The datamodule of a fit's config, without its model or Trainer.

    Raises:
        UserError: if there is no such file, or its keys are not those of the data.
    """
    settings = read_yaml(config)
    settings = settings.get("data", settings)

    from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

    from lightning_dalle.data.datamodule import CaptionedImageDataModule

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CaptionedImageDataModule, "data")
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in overrides.items()}
    arguments = [f"--data.{name}={text}" for name, text in texts.items()]
    try:
        parsed = parser.parse_args(arguments, namespace=parser.parse_object({"data": settings}, defaults=False))
        datamodule: CaptionedImageDataModule = parser.instantiate(parsed).data
    except ArgumentError as error:
        raise UserError(f"the data of {config}: {' '.join(str(error).split())}") from error
    return datamodule


class Counted(NamedTuple):
    """What a report tells of a split."""

    records: int
    rejected: Counter[str]
    examples: dict[str, str]
    """The first that was rejected for each reason."""

    @property
    def kept(self) -> int:
        """Records that are not rejected."""
        return self.records - self.rejected.total()


def count(rows: "Dataset | IterableDataset", limit: int | None, screening: "Screening") -> Counted:
    """Screens the first records of a split, or all."""
    from datasets import Dataset
    from datasets import Image as EncodedImage
    from rich.progress import track

    from lightning_dalle.data.filters.pipeline import Rejection, name_of
    from lightning_dalle.data.loading.streaming import Reader

    if isinstance(rows, Dataset):
        some = rows if limit is None else rows.take(limit)
        screened = screening.screen_rows(some.cast_column("image", EncodedImage(decode=False)))
        return Counted(len(some), screened.rejected, screened.examples)
    screening.check_stream()
    records, rejected, examples = 0, Counter[str](), dict[str, str]()
    stream = itertools.islice(Reader(rows, index=0, count=1, seed=None, buffer=1).one_pass(), limit)
    for record in track(stream, description="Screening", total=limit, transient=True):
        verdict = screening.verdict(record)
        if isinstance(verdict, Rejection):
            rejected[verdict.reason] += 1
            examples.setdefault(verdict.reason, name_of(record, records))
        records += 1
    return Counted(records, rejected, examples)


def write_floods(file: Path, splits: Mapping[str, Any], limit: int | None, screening: "Screening") -> None:
    """Counts the captions of the training split, and writes down those that are too many."""
    from lightning_dalle.data.captions import caption_list
    from lightning_dalle.data.filters.rules import CaptionFlood, Floods, count_captions

    if "train" not in splits:
        raise UserError(f"floods are counted in the split train, but the source has {', '.join(splits)}")
    judge = next((judge for judge in screening.filters if isinstance(judge, CaptionFlood)), CaptionFlood())
    records = itertools.islice(splits["train"].select_columns("captions"), limit)
    counts = count_captions(caption_list(record["captions"]) for record in records)
    found = Floods.of(counts, judge.max_count).counts
    text = json.dumps({"more_than": judge.max_count, "captions": found}, ensure_ascii=False, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text + "\n")
    print(f"{len(found)} captions of more than {judge.max_count} records, written to {file}")


def table(counted: Mapping[str, Counted], screening: "Screening") -> "Table":
    """A column for each split, a line for each reason, with the share of all records and one that was rejected."""
    from rich.table import Table
    from rich.text import Text

    def cells(numbers: Iterable[int]) -> list[str]:
        return [f"{n:,} ({n / max(of.records, 1):.1%})" for n, of in zip(numbers, counted.values(), strict=True)]

    examples: dict[str, str] = {}
    for of in counted.values():
        for reason, name in of.examples.items():
            examples.setdefault(reason, name)
    sheet = Table("rejected for", title="What each filter costs")
    for split in counted:
        sheet.add_column(split, justify="right")
    sheet.add_column("such as", overflow="fold")
    for reason in dict.fromkeys([*(judge.reason for judge in screening.filters), *examples]):
        example = Text(examples.get(reason, ""))  # a name's brackets are no markup
        sheet.add_row(reason, *cells(of.rejected[reason] for of in counted.values()), example)
    sheet.add_section()
    sheet.add_row("kept", *cells(of.kept for of in counted.values()))
    sheet.add_row("records", *cells(of.records for of in counted.values()))
    return sheet
