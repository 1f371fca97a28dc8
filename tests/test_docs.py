"""Every path, name and command in README, docs and config headers exists and parses; nothing is run."""

import ast
import itertools
import re
import shlex
from collections.abc import Iterator
from functools import cache, wraps
from pathlib import Path
from string import Template
from typing import Any

import pytest
from pytorch_lightning.cli import LightningCLI

from lightning_dalle import cli, lightning_cli

ROOT = Path(__file__).parent.parent
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), Path("evals/README.md"), *sorted(Path("docs").glob("*.md"))]
CONFIGS = sorted(Path("configs").rglob("*.yaml"))
FOLDERS = ("benchmarks", "configs", "docs", "evals", "lightning_dalle", "notebooks", "tests")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FOREIGN = {
    "powerSGD_hook", "data_parallel_size", "use_float16", "use_mixed_precision", "LIGHTNING_DALLE_INCEPTION",
    "OrderedDict", "all_reduce", "my_clip", "lightning_dalle.encoding",
}  # fmt: skip
"""Names in the docs that belong to other packages or to the environment."""


def commands(lines: list[str]) -> Iterator[list[str]]:
    """Yield the words of each shell command, with the variables that the lines assign replaced by their values."""
    variables: dict[str, str] = {}
    text = "\n".join(lines).replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(Template(line).safe_substitute(variables), comments=True)
        while words and (assignment := re.fullmatch(r"([A-Z]+)=(.*)", words[0])):
            variables[assignment[1]] = Template(assignment[2]).safe_substitute(variables)
            words = words[1:]
        start = 0
        for end in [i for i, word in enumerate(words) if word == "&&"] + [len(words)]:
            yield words[start:end]
            start = end + 1


def all_commands() -> Iterator[list[str]]:
    """Yield the words of each shell command in the pages and in the heads of the configs."""
    for page in PAGES:
        blocks = [block for language, block in FENCE.findall((ROOT / page).read_text()) if language == "bash"]
        yield from commands("".join(blocks).splitlines())
    for config in CONFIGS:
        head = [line[1:] for line in (ROOT / config).read_text().splitlines() if line.startswith("#")]
        starts = [i for i, line in enumerate(head) if "-m lightning_dalle " in line]
        for i in starts:
            end = next(j for j in range(i, len(head)) if not head[j].rstrip().endswith("\\"))
            command = [re.sub(r"\s+\(docs/.*\)$", "", line) for line in head[i : end + 1]]
            yield from commands(command)


def arguments(words: list[str], module: str) -> list[str] | None:
    """Return the words after `-m MODULE`, or None if the command does not run the module."""
    found = [i for i, (flag, name) in enumerate(itertools.pairwise(words)) if (flag, name) == ("-m", module)]
    return words[found[0] + 2 :] if found else None


COMMANDS = sorted({tuple(argv) for command in all_commands() if (argv := arguments(command, "lightning_dalle"))})


@pytest.fixture(scope="module")
def built_parsers() -> dict[str, Any]:
    """Return the attributes that LightningCLI sets when it builds its parsers, which takes seconds and is done once."""
    return {}


@pytest.fixture
def parse_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_parsers: dict[str, Any]) -> Path:
    """Enter a folder with this repo's files where commands are parsed but neither instantiated nor run."""
    for name in FOLDERS:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning_cli, "use_initial_shape", lambda config, model: None)  # it reads the trained model
    build = LightningCLI.setup_parser

    def setup_parser(self: LightningCLI, *args: Any) -> None:
        if not built_parsers:
            before = set(vars(self))
            build(self, *args)
            built_parsers.update({name: value for name, value in vars(self).items() if name not in before})
        vars(self).update(built_parsers)

    def parsed(function: Any) -> Any:
        @wraps(function)
        def nothing(*args: Any, **kwargs: Any) -> None:
            pass

        return nothing

    monkeypatch.setattr(LightningCLI, "setup_parser", setup_parser)
    monkeypatch.setattr(LightningCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(cli, "COMMANDS", {name: parsed(function) for name, function in cli.COMMANDS.items()})
    return tmp_path


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_command_parses(argv: tuple[str, ...], parse_only: Path) -> None:
    for option, value in itertools.pairwise(argv):
        if option == "--ckpt_path":  # a sharded checkpoint is not read here
            (parse_only / value).mkdir(parents=True)
            (parse_only / value / ".metadata").touch()
    cli.main(list(argv))


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 50
    assert ("reproduce", "--config", "configs/openmoji/quickstart.yaml") in COMMANDS
    assert not [argv for argv in COMMANDS if "$" in " ".join(argv)], "a variable has no value"


@pytest.mark.parametrize(
    "argv",
    [["generate", "--checkpoint", "a", "--tpo", "1"], ["fit", "--config", "configs/coco/dvae.yaml", "--tpo", "1"]],
)
def test_a_wrong_option_is_found(argv: list[str], parse_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert "tpo" in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_paths_exist(page: Path) -> None:
    text = (ROOT / page).read_text()
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in links if target and not (ROOT / page.parent / target).exists()]
    words = re.findall(rf"(?<![\w./])(?:{'|'.join(FOLDERS)})/[\w./*-]*\w", text)
    missing += [word for word in words if page != Path("evals/README.md") and not list(ROOT.glob(word))]
    names = re.findall(r"`([\w*]+\.(?:py|yaml|md|ipynb|cff))`", text)
    missing += [name for name in names if name not in ("my.yaml",) and not list(repo_files(name))]
    assert not missing


def repo_files(name: str) -> Iterator[Path]:
    """Yield the files of a name in the root or below the folders of this repo."""
    yield from ROOT.glob(name)
    for folder in FOLDERS:
        yield from (ROOT / folder).rglob(name)


@cache
def code_words() -> set[str]:
    """Return all words of the code, configs and file names."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    texts = [(ROOT / "pyproject.toml").read_text(), *(path.read_text() for path in files if path != Path(__file__))]
    return {word for text in texts for word in re.findall(r"\w+", text)} | {path.stem for path in files}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_identifiers_are_in_the_code(page: Path) -> None:
    """Words with an underscore or a capital inside, between backticks, are names in code or configs."""
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", (ROOT / page).read_text()))
    words = {word for span in spans for word in re.findall(r"\b[A-Za-z_]\w*", span)}
    unknown = {word for word in words if re.search(r"_|[a-z][A-Z]", word)} - code_words() - FOREIGN
    assert not unknown


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=str)
def test_dotted_names_exist(page: Path) -> None:
    text = (ROOT / page).read_text()
    missing = [name for name in re.findall(r"lightning_dalle(?:\.\w+)+", text) if not is_defined(name)]
    missing = [name for name in missing if name not in FOREIGN]
    missing += [
        f"{node.module}.{alias.name}"
        for language, block in FENCE.findall(text)
        if language == "python"
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_dalle")
        for alias in node.names
        if not is_defined(f"{node.module}.{alias.name}")
    ]
    assert not missing


def is_defined(dotted: str) -> bool:
    """Return whether a dotted name is a module of the package, or is defined in one."""
    path, *rest = dotted.split(".")
    while rest and ((ROOT / path / rest[0]).is_dir() or (ROOT / path / f"{rest[0]}.py").is_file()):
        path = f"{path}/{rest.pop(0)}"
    file = ROOT / f"{path}.py" if (ROOT / f"{path}.py").is_file() else ROOT / path / "__init__.py"
    return not rest or bool(re.search(rf"\b{rest[0]}\b", file.read_text()))


def test_benchmarks_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"benchmarks\.(\w+)", (ROOT / page).read_text())} - {"NAME"}
    assert named
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in named), named


def test_layout_of_the_readme_names_every_module() -> None:
    [layout] = [
        block for _, block in FENCE.findall(Path("README.md").read_text()) if block.startswith("lightning_dalle/")
    ]
    folders = ["lightning_dalle"]
    named = set()
    for line in layout.splitlines()[1:]:
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth] if depth else []
        named.discard(Path(*folders))  # a folder whose files are listed does not stand for them
        words = re.match(r"\s*((?:\w+(?:\.py|/) ?)+)", line)[1].split()  # type: ignore[index]
        for word in words:
            path = Path(*folders, word)
            assert (ROOT / path).exists(), path
            named.add(path)
        folders += [word for word in words if len(words) == 1 and word.endswith("/")]
    for path in (ROOT / "lightning_dalle").rglob("*.py"):
        relative = path.relative_to(ROOT)
        is_named = relative in named or any(parent in named for parent in relative.parents)
        assert is_named or path.name in ("__init__.py", "__main__.py"), (
            f"{relative} is in no room of the README's layout"
        )
