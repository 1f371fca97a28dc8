"""Every config in the repo is parsed, and what it states agrees with itself."""

from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_dalle.cli import lightning
from lightning_dalle.commands.reproduce import reproduce
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.training.callbacks import GradientScaleCurves, SampleGrid
from lightning_dalle.training.encoding import CodesWriter
from lightning_dalle.training.evaluation import Evaluation
from lightning_dalle.training.gradient_scales import PaperPrecision
from lightning_dalle.training.moments import PaperAdamW

CONFIGS = sorted(Path("configs").rglob("*.yaml"))
RECIPES = [path for path in CONFIGS if "stages" in yaml.safe_load(path.read_text())]
PROTOCOLS = sorted(Path("configs/protocols").glob("*.yaml"))
EVALS = sorted(Path("configs").rglob("eval*.yaml"))
ENCODINGS = sorted(Path("configs").rglob("encode.yaml"))
DATA = sorted(Path("configs/data").glob("*.yaml"))
PAPER = Path("configs/paper")
SIXTEEN_BIT = PAPER / "sixteen_bit.yaml"
BEHIND_ANOTHER = [path for path in PAPER.glob("*.yaml") if "data" not in yaml.safe_load(path.read_text())]
FITS = [path for path in CONFIGS if path not in (*RECIPES, *PROTOCOLS, *EVALS, *ENCODINGS, *DATA, *BEHIND_ANOTHER)]


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


@pytest.mark.parametrize("path", ENCODINGS, ids=str)
def test_predict_accepts_the_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = lightning(["predict", "--config", str(path), "--trainer.accelerator", "cpu"])
    [writer] = [found for found in cli.trainer.callbacks if isinstance(found, CodesWriter)]  # type: ignore[attr-defined]
    assert set(writer.crops) == {"train", "val"}
    assert cli.config.predict.return_predictions is False, "all codes of all pictures would be kept in memory"


@pytest.mark.parametrize("path", DATA, ids=str)
def test_data_takes_the_place_of_a_fits_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = lightning(
        ["fit", "--config", "configs/coco/dvae.yaml", "--config", str(path), "--trainer.accelerator", "cpu"]
    )
    wanted = yaml.safe_load(path.read_text())["data"]["source"]
    source = cli.datamodule.source
    assert type(source).__name__ == wanted["class_path"].rpartition(".")[2]
    for name, value in wanted["init_args"].items():
        assert name == "sources" or getattr(source, name) == value


@pytest.mark.parametrize("path", ["configs/openmoji/quickstart_dalle.yaml", "configs/openmoji/dalle.yaml"])
def test_sixteen_bits_go_on_top_of_another_precision_and_optimizer(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = lightning(["fit", "--config", path, "--config", str(SIXTEEN_BIT), "--trainer.accelerator", "cpu"])
    assert isinstance(cli.trainer.precision_plugin, PaperPrecision)
    assert {SampleGrid, GradientScaleCurves} <= {type(callback) for callback in cli.trainer.callbacks}  # type: ignore[attr-defined]
    optimizer = cli.model.optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "is_hidden": True}])  # type: ignore[operator]
    assert isinstance(optimizer, PaperAdamW)
    assert {**optimizer.defaults, "lr": None} == {
        "lr": None, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 4.5e-2,
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_stage_of_a_recipe_is_accepted_with_its_overrides(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning.cli import LightningCLI

    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    parser = ArgumentParser()
    parser.add_function_arguments(reproduce)
    recipe = parser.instantiate(parser.parse_path(path))
    assert recipe.reranking is None or "clip" in recipe.stages
    kinds = {"dvae": "LitDVAE", "dalle": "LitDALLE", "clip": "LitCLIP"}
    for name, arguments in recipe.stages.items():
        fit = [argument.replace("{run_dir}", str(recipe.run_dir)) for argument in arguments]
        cli = lightning(["fit", *fit, "--trainer.accelerator", "cpu"])
        assert type(cli.model).__name__ == kinds[name]


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
