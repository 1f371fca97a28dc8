"""Lists of records excluded from training, which `data overlap` writes and the filter `Excluded` applies."""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lightning_dalle.errors import UserError


class Exclusion(NamedTuple):
    """Record excluded from training, which is one line of an exclusion list."""

    id: str
    """Id of the excluded record."""
    reason: str
    match: str
    """Id of the image that the record duplicates, in the reference set or among the kept records."""
    distance: float


def write_exclusions(file: Path, exclusions: Iterable[Exclusion]) -> None:
    """Write an exclusion list as tab-separated values with a header."""
    with file.open("w", newline="") as opened:
        lines = csv.writer(opened, dialect="excel-tab", lineterminator="\n")
        lines.writerow(Exclusion._fields)
        lines.writerows((*exclusion[:3], f"{exclusion.distance:.4f}") for exclusion in exclusions)


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """Filter that rejects the records whose ids are on an exclusion list."""

    reason: ClassVar[str] = "on the exclusion list"

    file: Path
    """Tab-separated values with a column `id`, such as `data overlap` writes. Other columns are ignored."""
    ids: dict[str, None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # `datasets` caches by the pickled filter: the ids must be part of it, in the order of the file.
        try:
            with self.file.open(newline="") as opened:
                ids = dict.fromkeys(line["id"] for line in csv.DictReader(opened, dialect="excel-tab"))
        except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"cannot read the exclusion list {self.file} ({error!r}); the filter Excluded needs a file with "
                "tab-separated columns, one of them id, such as `data overlap` writes"
            ) from error
        object.__setattr__(self, "ids", ids)

    def rejects_record(self, record: Mapping[str, Any]) -> bool:
        if "id" not in record:
            raise UserError(
                f"the exclusion list {self.file} needs records with an id, but this source has only the columns "
                f"{', '.join(record)}; remove the filter Excluded"
            )
        return record["id"] in self.ids
