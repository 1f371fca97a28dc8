"""`data report`: count the records of a dataset, and how many of them each filter rejects, before training."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_dalle.errors import UserError
from lightning_dalle.files import make_folder, read_yaml, write_json, write_text
from lightning_dalle.provenance import commit

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from rich.table import Table

    from lightning_dalle.data.datamodule import CaptionedImageDataModule
    from lightning_dalle.data.filters.pipeline import FilterPipeline


def report(
    config: Path,
    data: dict[str, Any] | None = None,
    limit: int | None = None,
    out: Path | None = None,
    caption_counts: Path | None = None,
) -> None:
    """Print how many records of each split every filter rejects, with an example, and how many are kept.

    Every image is decoded once. Training reuses the cached decisions about rows on disk.

    Args:
        config: config file of `fit`, or a file with its keys under `data` alone.
        data: keys under `data` to override, such as `--data.source.init_args.path my/images`.
        limit: number of records to check in each split, from its start; needed for streamed data without an end.
        out: JSON file to write the counts to.
        caption_counts: JSON file to write frequent captions of the split train to, with their counts. The filter
            DuplicateCaptions reads it for streamed data.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}, but must be at least 1")
    datamodule = read_datamodule(config, data or {})

    from rich.console import Console

    filters = datamodule.pipeline
    splits = datamodule.source.load(datamodule.image_size)
    if any("codes" in rows.column_names for rows in splits.values()):
        raise UserError(f"the data of {config} are codes, which no filter checks: give a config of the images instead")
    if caption_counts is not None:
        write_caption_counts(caption_counts, splits, limit, filters)
    reports = {name: split_report(rows, limit, filters) for name, rows in splits.items()}
    Console().print(table(reports, filters))
    if out is not None:
        result = {
            "config": str(config),
            "limit": limit,
            "filters": [repr(found) for found in filters.filters],
            "splits": {name: {**found._asdict(), "kept": found.kept} for name, found in reports.items()},
            "commit": commit(),
        }
        make_folder(out.parent)
        write_json(out, result)
        print(f"wrote the counts to {out}")


def read_datamodule(config: Path, overrides: dict[str, Any]) -> "CaptionedImageDataModule":
    """Return the datamodule of a config of `fit`, without building the model and the Trainer."""
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
        raise UserError(
            f"cannot build the data of {config}, correct its keys: {' '.join(str(error).split())}"
        ) from error
    return datamodule


class SplitReport(NamedTuple):
    """Number of records of one split, and of rejected records by reason."""

    records: int
    rejected: Counter[str]
    examples: dict[str, str]
    """File, URL, id or index of the first rejected record by reason."""

    @property
    def kept(self) -> int:
        """Number of records that pass all filters."""
        return self.records - self.rejected.total()


def split_report(rows: "Dataset | IterableDataset", limit: int | None, filters: "FilterPipeline") -> SplitReport:
    """Filter the first `limit` records of a split, or all of them, and return their counts."""
    from datasets import Dataset
    from datasets import Image as EncodedImage
    from rich.progress import track

    from lightning_dalle.data.filters.pipeline import Rejection, record_name
    from lightning_dalle.data.loading.streaming import ShardReader

    if isinstance(rows, Dataset):
        rows = rows if limit is None else rows.take(limit)
        _, rejected, examples = filters.filter_rows(rows.cast_column("image", EncodedImage(decode=False)))
        return SplitReport(len(rows), rejected, examples)
    num_records, rejected, examples = 0, Counter(), {}
    stream = itertools.islice(ShardReader(rows, 0, 1, seed=None, buffer_size=1).one_pass(), limit)
    for record in track(stream, description="Filtering", total=limit, transient=True):
        checked = filters.check(record, decode=True)
        if isinstance(checked, Rejection):
            rejected[checked.reason] += 1
            examples.setdefault(checked.reason, record_name(record, num_records))
        num_records += 1
    return SplitReport(num_records, rejected, examples)


def write_caption_counts(file: Path, splits: Mapping[str, Any], limit: int | None, filters: "FilterPipeline") -> None:
    """Write the captions of the split train that DuplicateCaptions rejects, with their counts."""
    from lightning_dalle.data.captions import caption_list
    from lightning_dalle.data.filters.rules import DuplicateCaptions

    if "train" not in splits:
        raise UserError(
            f"--caption_counts needs the split train, but data.source has only {', '.join(splits)}: omit it"
        )
    duplicates = next((found for found in filters.filters if isinstance(found, DuplicateCaptions)), DuplicateCaptions())
    records = itertools.islice(splits["train"].select_columns("captions"), limit)
    frequent = duplicates.counted(caption_list(record["captions"]) for record in records).counts
    text = json.dumps({"more_than": duplicates.max_count, "captions": frequent}, ensure_ascii=False, indent=1)
    make_folder(file.parent)
    write_text(file, text + "\n")
    print(f"wrote {len(frequent)} captions that occur in more than {duplicates.max_count} records to {file}")


def table(reports: Mapping[str, SplitReport], filters: "FilterPipeline") -> "Table":
    """Format reports as a table with a column per split and a line per reason."""
    from rich.table import Table
    from rich.text import Text

    def cells(numbers: Iterable[int]) -> list[str]:
        return [f"{n:,} ({n / max(s.records, 1):.1%})" for n, s in zip(numbers, reports.values(), strict=True)]

    examples: dict[str, str] = {}
    for split in reports.values():
        for reason, name in split.examples.items():
            examples.setdefault(reason, name)
    found = Table("rejected for", title="Records rejected by each filter")
    for name in reports:
        found.add_column(name, justify="right")
    found.add_column("such as", overflow="fold")
    for reason in dict.fromkeys([*(known.reason for known in filters.filters), *examples]):
        example = Text(examples.get(reason, ""))  # plain text, because brackets in a name are not markup
        found.add_row(reason, *cells(split.rejected[reason] for split in reports.values()), example)
    found.add_section()
    found.add_row("kept", *cells(split.kept for split in reports.values()))
    found.add_row("records", *cells(split.records for split in reports.values()))
    return found
