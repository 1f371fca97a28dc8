"""Import rules of the package, and the one list of its dependencies."""

import ast
from pathlib import Path

import pytest
import yaml

PACKAGE = Path("lightning_dalle")
FILES = sorted(PACKAGE.rglob("*.py"))

RANKS = (
    ("errors", "files", "hardware", "progress", "provenance"),
    ("images", "plots", "results_table", "schedules", "tokenizer"),
    ("models",),
    ("checkpoints", "cost_model", "losses", "openai_dvae"),
    ("data.captions", "data.images"),
    ("data.filters",),
    ("data.loading",),
    ("data.sources",),
    ("inference",),
    ("evaluation",),
    ("data.datamodule",),
    ("training",),
    ("lightning_cli",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""Rooms from the bottom to the top. A module imports its own rank and those below it."""

LIGHTNING = ("data.datamodule", "training", "lightning_cli")
"""Rooms that may import pytorch_lightning."""


def module(path: Path) -> str:
    """Return the dotted name of a file below the package; that of a package's `__init__.py` is the package's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere in it; `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = node.module.removeprefix("lightning_dalle.").removeprefix("lightning_dalle")
            for alias in node.names:
                name = f"{inner}.{alias.name}".lstrip(".")
                found.add(f"lightning_dalle.{name}" if name in MODULES else node.module)
    return found


def own_imports(name: str) -> set[str]:
    """Return the modules of the package that one of them imports, without the prefix."""
    names = {found.removeprefix("lightning_dalle.") for found in imports(MODULES[name]) if "lightning_dalle" in found}
    return names & set(MODULES)


def is_in(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def rank(name: str) -> int:
    """Return the rank of the longest room that a module is in."""
    return max((rank for rank, rooms in enumerate(RANKS) if is_in(name, rooms)), key=lambda rank: rank)


def test_every_module_is_in_a_room() -> None:
    packages = {"", "data"}  # their __init__.py files
    assert [name for name in MODULES if name not in packages and not any(is_in(name, rooms) for rooms in RANKS)] == []


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"", "data"}))
def test_a_module_imports_only_its_own_rank_and_those_below(name: str) -> None:
    above = {other for other in own_imports(name) - {"", "data"} if rank(other) > rank(name)}
    assert not above, f"{name} imports {', '.join(sorted(above))}, which is above it in RANKS"


def test_there_is_no_import_cycle() -> None:
    graph = {name: own_imports(name) - {name} for name in MODULES}
    while free := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"these modules import each other in a cycle: {', '.join(sorted(graph))}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_lightning_is_imported_by_training_alone(path: Path) -> None:
    found = {name for name in imports(path) if name.startswith("pytorch_lightning")}
    assert not found or is_in(module(path), LIGHTNING)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_private_module_or_name_of_another_package_is_imported(path: Path) -> None:
    found = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("lightning_dalle")
        for alias in node.names
    ]
    assert not [name for name in found if "._" in name]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_is_longer_than_350_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def test_the_package_is_small() -> None:
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 11_850


def test_environment_yml_points_to_the_one_list_of_packages() -> None:
    dependencies = yaml.safe_load(Path("environment.yml").read_text())["dependencies"]
    assert dependencies[-1] == {"pip": ["-e .[all]"]}
    assert [entry.split(">")[0] for entry in dependencies[:-1]] == ["python", "pip"]
