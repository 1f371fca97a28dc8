"""Results: files that `results` and `export` refuse, and the table."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_dalle.errors import UserError
from lightning_dalle.results_table import FORMAT, markdown_table, read_result


def result() -> dict[str, Any]:
    figures = {
        "images": {"generated": 6, "reference": 8},
        "fid": {"value": 12.3, "std": 0.5, "warning": "FID is biased"},
        "kid": {"value": 0.002, "std": 0.001},
        "inception_score": {"value": None},
        "precision": {"value": 0.5, "ci95": [0.4, 0.6]},
        "recall": {"value": 0.25, "ci95": None},
    }
    return {
        "format": FORMAT,
        "kind": "folders",
        "protocol": {"name": "mine"},
        "by_blur_radius": {"0": figures},
        "commit": "abc",
    }


def test_a_result_is_a_row_with_its_warnings_below() -> None:
    table, warnings = markdown_table({"one": result()}).split("\n\n")
    assert table.splitlines()[2] == (
        "| one | mine, folders, blur 0 | 6 against 8 | 12.30 ± 0.50 | 2.00 ± 1.00 |  | 0.50 (0.40 to 0.60) | 0.25 |  |"
    )
    assert warnings == "- one: FID is biased"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": None}, r"old\.json has result format 1, but format 2 is needed: repeat"),
        ({"format": 3}, r"old\.json has result format 3, but format 2 is needed: repeat"),
        (
            {"kind": "other"},
            r"old\.json is not a result of .*, choose another: KeyError\('unknown kind other'\)",
        ),
        (
            {"commit": None},
            r"old\.json is not a result of .*, choose another: KeyError\('commit'\)",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    changed = {key: value for key, value in {**result(), **changes}.items() if value is not None}
    (tmp_path / "old.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=message):
        read_result(tmp_path / "old.json")


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("[1")
    message = r"broken\.json is not a result of test, evaluate or reproduce, choose another: JSONDecode"
    with pytest.raises(UserError, match=message):
        read_result(tmp_path / "broken.json")
    with pytest.raises(UserError, match=r"there is no result at .*nowhere\.json: correct the path"):
        read_result(tmp_path / "nowhere.json")
