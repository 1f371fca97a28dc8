"""Lists of records that are not to be trained on: written by `data overlap`, read by a person, honoured by a filter.

Knows ids and the file. Knows nothing of pictures or of how the list came about.
"""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from lightning_dalle.errors import UserError


class Exclusion(NamedTuple):
    """A line of the list."""

    id: str
    """Of the record that is not to be trained on."""
    reason: str
    match: str
    """What the record is too near to: the id of a picture of the reference set, or of a record that stays."""
    distance: float


def write_exclusions(file: Path, exclusions: Iterable[Exclusion]) -> None:
    """A table of tab-separated columns, one line for each."""
    with file.open("w", newline="") as opened:
        lines = csv.writer(opened, dialect="excel-tab", lineterminator="\n")
        lines.writerow(Exclusion._fields)
        lines.writerows((*exclusion[:3], f"{exclusion.distance:.4f}") for exclusion in exclusions)


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """Filter of the records on a list.

    Raises:
        UserError: if there is no such list, or it has no column `id`.
    """

    reason: ClassVar[str] = "on the list of exclusions"

    list: Path
    """A table of tab-separated columns, one of them `id`, as `data overlap` writes it; the others are for people."""
    ids: dict[str, None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Read at once, and into a dict, which keeps its order: what `datasets` caches goes by all that a filter holds,
        # and would not know a list that changed.
        try:
            with self.list.open(newline="") as opened:
                ids = dict.fromkeys(line["id"] for line in csv.DictReader(opened, dialect="excel-tab"))
        except OSError as error:
            raise UserError(f"the list of exclusions {self.list} cannot be read: {error}") from error
        except (KeyError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(
                f"the list of exclusions is to be a table with a tab-separated column id, but {self.list} is not: "
                f"{error!r}"
            ) from error
        object.__setattr__(self, "ids", ids)

    def rejects_record(self, record: Mapping[str, Any]) -> bool:
        """Whether its id is on the list.

        Raises:
            UserError: if it has none.
        """
        if "id" not in record:
            raise UserError(
                f"the list of exclusions {self.list} names records by their id, but those of this source have only "
                f"{', '.join(record)}"
            )
        return record["id"] in self.ids
