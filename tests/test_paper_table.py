"""docs/paper.md names nothing that is not there."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

TABLE = Path("docs/paper.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:lightning_dalle|configs|tests)/[^`]+)`", TABLE)))


def names(tree: ast.AST) -> set[str]:
    """Of classes, their methods, and functions, as `Class.method`."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found |= {node.name, *(f"{node.name}.{name}" for name in names(node))}
    return found


@pytest.mark.parametrize("named", NAMED)
def test_what_the_table_names_is_there(named: str) -> None:
    file, _, within = named.partition("::")
    assert Path(file).is_file()
    if file.startswith("configs"):
        value: Any = yaml.safe_load(Path(file).read_text())
        for key in within.split(".") if within else []:
            value = value[key]
    elif within:
        assert within in names(ast.parse(Path(file).read_text()))


def test_every_fact_has_a_place_and_a_test_or_says_why_not() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("|") and not line.startswith(("| fact", "|---"))]
    assert len(rows) > 50
    for row in rows:
        fact, where, test = (cell.strip() for cell in row.strip("|").split(" | "))
        assert fact
        assert "`" in where or where.startswith("not here: "), fact
        assert "`tests/" in test or test.startswith("none"), fact
