"""docs/paper.md gives a place and a test for every fact, and each of them exists."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

TEXT = Path("docs/paper.md").read_text()
FACTS = re.findall(
    r"^\* (.+?)\n  \* where:\s+(.+?)\n  \* test:\s+(.+?)(?=\n\*|\n\n|\n?\Z)", TEXT, re.DOTALL | re.MULTILINE
)
REFERENCES = sorted(set(re.findall(r"`((?:lightning_dalle/|configs/|test_)[^`]+)`", TEXT)))


def definitions(tree: ast.AST) -> set[str]:
    """Return the names of classes, methods (as `Class.method`) and functions."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found |= {node.name, *(f"{node.name}.{name}" for name in definitions(node))}
    return found


@pytest.mark.parametrize("reference", REFERENCES)
def test_what_the_page_refers_to_exists(reference: str) -> None:
    name, _, within = reference.partition("::")
    [file] = Path("tests").rglob(name) if name.startswith("test_") else [Path(name)]
    if name.startswith("configs"):
        value: Any = yaml.safe_load(file.read_text())
        for key in within.split(".") if within else []:
            value = value[key]
    else:
        assert file.is_file()
        assert within in definitions(ast.parse(file.read_text())) if within else name.startswith("lightning_dalle")


def test_every_fact_has_a_place_and_a_test_or_says_why_not() -> None:
    assert len(FACTS) == len(re.findall(r"^\* ", TEXT, re.MULTILINE)) > 50
    for fact, where, test in FACTS:
        assert "`lightning_dalle/" in where or "`configs/" in where or where.startswith("not here: "), fact
        assert "`test_" in test or test.startswith("none"), fact
