"""What is written down is whole and has a number wherever it says so."""

from pathlib import Path

import pytest

from lightning_dalle.errors import UserError
from lightning_dalle.files import write_json


def test_a_figure_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not written, since a figure in it is no number"):
        write_json(tmp_path / "result.json", {"fid": {"value": float("nan")}})
    assert not list(tmp_path.iterdir())
