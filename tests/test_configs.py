"""Every config in the repo is parsed, and what it states agrees with itself."""

import itertools
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_dalle.cli import lightning
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.inference.options import SamplingOptions
from lightning_dalle.training.evaluation import Evaluation

CONFIGS = sorted(Path("configs").rglob("*.yaml"))
RECIPES = [path for path in CONFIGS if "stages" in yaml.safe_load(path.read_text())]
PROTOCOLS = sorted(Path("configs/protocols").glob("*.yaml"))
EVALS = sorted(Path("configs").rglob("eval*.yaml"))
FITS = [path for path in CONFIGS if path not in (*RECIPES, *PROTOCOLS, *EVALS)]


@pytest.mark.parametrize("path", FITS, ids=str)
def test_fit_accepts_the_config(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = lightning(["fit", "--config", str(path), "--trainer.accelerator", "cpu"])
    assert type(cli.model).__name__ in ("LitDVAE", "LitDALLE", "LitCLIP")
    every = cli.trainer.checkpoint_callback._every_n_train_steps  # type: ignore[union-attr]
    assert cli.trainer.max_steps % every == 0, "the last steps would not be saved"
    assert cli.model.learning_rate.num_steps == cli.trainer.max_steps


@pytest.mark.parametrize("path", EVALS, ids=str)
def test_test_accepts_the_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = lightning(["test", "--config", str(path), "--trainer.accelerator", "cpu"])
    evaluation = next(found for found in cli.trainer.callbacks if isinstance(found, Evaluation))  # type: ignore[attr-defined]
    assert evaluation.protocol.name in (path.parent.name, f"{path.parent.name}_zero_shot")


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipe_names_configs_that_are_there(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text())
    assert set(recipe) <= {"run_dir", "stages", "prompts", "sampling", "reranking"}
    SamplingOptions(**recipe.get("sampling", {}))
    for arguments in recipe["stages"].values():
        files = [Path(value) for option, value in itertools.pairwise(arguments) if option == "--config"]
        assert files
        assert all(file in FITS for file in files)


@pytest.mark.parametrize("path", PROTOCOLS, ids=str)
def test_protocol_says_what_it_is_called(path: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(Protocol)
    protocol = parser.instantiate_classes(parser.parse_path(path))
    assert protocol.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_config_opens_with_its_command_its_time_and_its_result(path: Path) -> None:
    head = [line for line in path.read_text().splitlines()[:8] if line.startswith("#")]
    assert any(f"--config {path}" in line or f"--protocol {path}" in line for line in head)
    assert len(head) >= 3
    assert "TIME AND RESULT" not in path.read_text()
