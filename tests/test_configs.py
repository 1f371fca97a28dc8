"""Every config of the repo is parsed, and its values are consistent."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.strategies import ModelParallelStrategy

from lightning_dalle import lightning_cli
from lightning_dalle.commands.reproduce import reproduce
from lightning_dalle.data.images.transforms import DALLEAugmentation, DVAEAugmentation
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.lightning_cli import run_lightning
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.callbacks.codes_writer import CodesWriter
from lightning_dalle.training.callbacks.evaluation import Evaluation
from lightning_dalle.training.callbacks.visualization import GradientScaleCurves
from lightning_dalle.training.distributed.powersgd import PowerSGDStrategy
from lightning_dalle.training.lit_dalle import check_checkpoint_order
from lightning_dalle.training.optim.adamw16 import PaperAdamW
from lightning_dalle.training.precision.gradient_scales import PaperPrecision

CONFIGS = sorted(Path("configs").rglob("*.yaml"))
RECIPES = [path for path in CONFIGS if "stages" in yaml.safe_load(path.read_text())]
PROTOCOLS = sorted(Path("configs/protocols").glob("*.yaml"))
EVALS = sorted(Path("configs").rglob("eval*.yaml"))
ENCODINGS = sorted(Path("configs").rglob("encode.yaml"))
DATA = sorted(Path("configs/data").glob("*.yaml"))
PAPER = Path("configs/paper")
FRAGMENTS = [path for path in PAPER.glob("*.yaml") if "data" not in yaml.safe_load(path.read_text())]
FITS = [path for path in CONFIGS if path not in (*RECIPES, *PROTOCOLS, *EVALS, *ENCODINGS, *DATA, *FRAGMENTS)]


@pytest.mark.parametrize("path", FITS, ids=str)
def test_fit_accepts_the_config(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(lightning_cli, "use_initial_shape", lambda config, model: None)  # it reads the trained model
    cli = run_lightning(["fit", "--config", str(path), "--trainer.accelerator", "cpu"])
    assert type(cli.model).__name__ in ("LitDVAE", "LitDALLE", "LitCLIP")
    every = cli.trainer.checkpoint_callback._every_n_train_steps or cli.trainer.val_check_interval  # type: ignore[union-attr]
    assert cli.trainer.max_steps % every == 0, "the last steps would not be saved"
    for name in ("learning_rate", "temperature", "kl_weight"):
        schedule = getattr(cli.model, name, None)
        if isinstance(schedule, CosineAnneal):
            within = schedule.for_max_steps(cli.trainer.max_steps)
            assert within(cli.trainer.max_steps) == pytest.approx(schedule.end), name
            assert within.warmup_steps == schedule.warmup_steps, name


@pytest.mark.parametrize(
    ("names", "n_layer", "width"),
    [
        (["dalle_12b"], 64, 3968),
        (["dalle_12b", "dalle_5_6b"], 64, 2688),
        (["dalle_12b", "dalle_2_8b"], 64, 1920),
        (["dalle_1b"], 24, 1792),
    ],
    ids=["12b", "5_6b", "2_8b", "1b"],
)
def test_paper_models_have_the_papers_sizes_and_patterns(names: list[str], n_layer: int, width: int) -> None:
    """Check section 2.2 and appendix B.1; the widths of the smaller models are in Table 1."""
    model, dvae = fit_of(*names).model, fit_of("dvae").model.dvae
    config = DALLEConfig(
        transformer=model.config, text_len=model.text_len, text_vocab_size=model.text_vocab_size,
        grid=dvae.config.grid, codebook_size=dvae.config.codebook_size,
    )  # fmt: skip
    assert (config.text_len, config.text_vocab_size, config.grid, config.codebook_size) == (256, 16384, 32, 8192)
    with torch.device("meta"):
        dalle = DALLE(config)
    blocks = dalle.transformer.blocks
    assert model.config.head_dim == 64
    assert sum(p.numel() for p in blocks.parameters() if p.ndim == 2) == 12 * width**2 * n_layer
    gains_and_biases = 3 + 1 + 4 + 1 + 2 * 2  # of queries, keys and values, two projections, the expansion, two norms
    gains_and_biases_of_heads = 4 * model.config.head_dim * model.config.qk_norm
    assert (
        sum(p.numel() for p in blocks.parameters() if p.ndim == 1)
        == (gains_and_biases * width + gains_and_biases_of_heads) * n_layer
    )
    patterns = dalle.transformer.patterns
    assert [pattern.kind for pattern in patterns[:4]] == ["row", "column", "row", "row"]
    assert [i for i, pattern in enumerate(patterns, 1) if pattern.kind == "column"] == list(range(2, n_layer, 4))
    assert patterns[-1].kind == "conv"
    assert all((p.text_len, p.image_len, p.grid, p.kernel) == (257, 1023, 32, 11) for p in patterns)


def test_paper_configs_have_the_papers_numbers() -> None:
    """Check the numbers of training; docs/paper.md lists all numbers."""
    dvae, dalle = fit_of("dvae"), fit_of("dalle_12b")
    lit = dvae.model
    assert (lit.learning_rate(0), lit.learning_rate(1_200_000)) == (1e-4, pytest.approx(1.25e-6))
    assert (lit.temperature(0), lit.temperature(150_000)) == (1, 1 / 16)
    assert (lit.kl_weight(0), lit.kl_weight(5_000), lit.codebook_entropy_weight, lit.mse_weight) == (0, 6.6, 0, 0)
    assert optimizer_of(lit) == (torch.optim.AdamW, {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4})
    assert isinstance(dvae.datamodule.augmentation, DVAEAugmentation)
    [average] = [found for found in dvae.trainer.callbacks if isinstance(found, EMAWeightAveraging)]  # type: ignore[attr-defined]
    assert average._kwargs["avg_fn"](torch.ones(()), torch.zeros(()), 1) == pytest.approx(0.999, abs=1e-6)
    assert batch_of(dvae) == 512
    assert dvae.trainer.max_steps == 3_000_000

    lit, data = dalle.model, dalle.datamodule
    assert [lit.learning_rate(step) for step in (0, 2_500, 5_000)] == [0, 2.25e-4, 4.5e-4]
    assert lit.learning_rate.max_reductions == 5
    check_checkpoint_order(dalle.trainer)
    assert lit.image_loss_weight == 7
    assert (lit.caption_dropout, lit.code_corruption, lit.soft_targets) == (0, 0, False)
    assert lit.checkpoint_activations
    assert optimizer_of(lit) == (torch.optim.AdamW, {"betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 4.5e-2})
    assert isinstance(data.augmentation, DALLEAugmentation)
    assert (data.image_size, data.text_len, data.vocab_size, data.bpe_dropout) == (256, 256, 16384, 0.1)
    assert (batch_of(dalle), dalle.trainer.world_size) == (1024, 1024)
    assert (dalle.trainer.max_steps, dalle.trainer.gradient_clip_val) == (430_000, 4)
    assert isinstance(dalle.trainer.strategy, ModelParallelStrategy)


def test_powersgd_config_replaces_the_strategy() -> None:
    strategy = fit_of("dalle_12b", "powersgd").trainer.strategy
    assert (type(strategy), strategy.rank, strategy.shards) == (PowerSGDStrategy, 896, 8)


@cache
def fit_of(*names: str) -> LightningCLI:
    configs = [argument for name in names for argument in ("--config", f"{PAPER}/{name}.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
        return run_lightning(["fit", *configs, "--trainer.accelerator", "cpu"])


def optimizer_of(model: Any) -> tuple[type, dict[str, Any]]:
    made = model.optimizer([{"params": [torch.nn.Parameter(torch.ones(1))]}])
    return type(made), {name: made.defaults[name] for name in ("betas", "eps", "weight_decay")}


def batch_of(cli: LightningCLI) -> int:
    return cli.datamodule.batch_size * cli.trainer.world_size


def test_the_attention_of_a_model_is_a_config_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    options = ["--model.config.attention", "[full, row]", "--model.config.last_attention", "full"]
    cli = run_lightning(["fit", "--config", "configs/openmoji/quickstart_dalle.yaml", *options])
    assert cli.model.config.layer_attention == ["full", "row", "full", "full"]


@pytest.mark.parametrize("path", EVALS, ids=str)
def test_test_accepts_the_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = run_lightning(["test", "--config", str(path), "--trainer.accelerator", "cpu"])
    evaluation = next(found for found in cli.trainer.callbacks if isinstance(found, Evaluation))  # type: ignore[attr-defined]
    assert evaluation.protocol.name in (path.parent.name, f"{path.parent.name}_zero_shot")


@pytest.mark.parametrize("path", ENCODINGS, ids=str)
def test_predict_accepts_the_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = run_lightning(["predict", "--config", str(path), "--trainer.accelerator", "cpu"])
    [writer] = [found for found in cli.trainer.callbacks if isinstance(found, CodesWriter)]  # type: ignore[attr-defined]
    assert set(writer.crops) == {"train", "val"}
    assert cli.config.predict.return_predictions is False, "the codes of all images would be kept in memory"


@pytest.mark.parametrize("path", DATA, ids=str)
def test_data_config_replaces_the_source(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = run_lightning(
        ["fit", "--config", "configs/coco/dvae.yaml", "--config", str(path), "--trainer.accelerator", "cpu"]
    )
    wanted = yaml.safe_load(path.read_text())["data"]["source"]
    source = cli.datamodule.source
    assert type(source).__name__ == wanted["class_path"].rpartition(".")[2]
    for name, value in wanted["init_args"].items():
        assert name == "sources" or getattr(source, name) == value


@pytest.mark.parametrize("path", ["openmoji/quickstart_dalle", "openmoji/dalle", "paper/dalle_12b"])
def test_fp16_config_overrides_precision_and_optimizer(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    on_cpu = ["--trainer.accelerator", "cpu"]
    cli = run_lightning(
        ["fit", "--config", f"configs/{path}.yaml", "--config", f"{PAPER}/fp16_per_block_scale.yaml", *on_cpu]
    )
    assert isinstance(cli.trainer.precision_plugin, PaperPrecision)
    assert any(isinstance(callback, GradientScaleCurves) for callback in cli.trainer.callbacks)  # type: ignore[attr-defined]
    optimizer = cli.model.optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "is_block_matrix": True}])  # type: ignore[operator]
    assert isinstance(optimizer, PaperAdamW)
    assert {**optimizer.defaults, "lr": None} == {
        "lr": None, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 4.5e-2,
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_stage_of_a_recipe_is_accepted_with_its_overrides(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    parser = ArgumentParser()
    parser.add_function_arguments(reproduce)
    recipe = parser.instantiate(parser.parse_path(path))
    assert recipe.reranking is None or "clip" in recipe.stages
    kinds = {"dvae": "LitDVAE", "dalle": "LitDALLE", "clip": "LitCLIP"}
    for name, arguments in recipe.stages.items():
        fit = [argument.replace("{run_dir}", str(recipe.run_dir)) for argument in arguments]
        cli = run_lightning(["fit", *fit, "--trainer.accelerator", "cpu"])
        assert type(cli.model).__name__ == kinds[name]


@pytest.mark.parametrize("path", PROTOCOLS, ids=str)
def test_protocol_is_named_like_its_file(path: Path) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(Protocol)
    protocol = parser.instantiate_classes(parser.parse_path(path))
    assert protocol.name == path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_config_header_has_the_command_and_the_result(path: Path) -> None:
    head = [line for line in path.read_text().splitlines()[:8] if line.startswith("#")]
    assert any(f"--config {path}" in line or f"--protocol {path}" in line for line in head)
    assert len(head) >= 3
    assert "TIME AND RESULT" not in path.read_text()
