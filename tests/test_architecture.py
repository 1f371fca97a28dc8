"""Who may import whom: see the table of rooms in the README."""

import ast
from pathlib import Path

import pytest
import yaml

PACKAGE = Path("lightning_dalle")
FILES = sorted(PACKAGE.rglob("*.py"))
LEAVES = {
    "errors",
    "schedules",
    "tokenizer",
    "pictures",
    "machine",
    "inference.options",
    "data.openmoji",
    "data.captions",
    "data.filters",
    "data.language",
}


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
    return found


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_lightning_is_known_only_where_training_is(path: Path) -> None:
    knows = {name for name in imports(path) if name.startswith("pytorch_lightning")}
    assert not knows or path.parent.name == "training" or module(path) in ("data.datamodule", "cli")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_leaves_know_nothing_of_ours_and_models_only_each_other(path: Path) -> None:
    ours = {name.removeprefix("lightning_dalle.") for name in imports(path) if name.startswith("lightning_dalle.")}
    ours -= {"errors"}
    if module(path) in LEAVES:
        assert ours == set()
    if path.parent.name == "models":
        assert all(name.startswith("models") for name in ours)
    if path.parent.name in ("inference", "evaluation", "data", "models"):
        assert not any(name.startswith(("training", "cli", "commands")) for name in ours)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert path.name == "__main__.py" or ast.get_docstring(ast.parse(path.read_text()))


def test_environment_yml_points_to_the_one_list_of_packages() -> None:
    dependencies = yaml.safe_load(Path("environment.yml").read_text())["dependencies"]
    assert dependencies[-1] == {"pip": ["-e ."]}
    assert [entry.split(">")[0] for entry in dependencies[:-1]] == ["python", "pip"]
