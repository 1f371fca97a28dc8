"""Options of the Trainer and the optimizer: they work, or one sentence refuses them."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_dalle.cli import main
from lightning_dalle.data.loading.examples import Batch
from lightning_dalle.errors import UserError
from lightning_dalle.models.dvae import DVAEConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.lit_dvae import LitDVAE

CONFIG = DVAEConfig(image_size=32, codebook_size=11, n_group=3, n_block=1, n_hid=8, n_init=8)


def loader(batches: int = 3) -> DataLoader[Any]:
    batch = Batch(torch.rand(2, 3, 32, 32), torch.zeros(2, 4), torch.zeros(2, dtype=torch.bool), ["a", "b"], ["0", "1"])
    return DataLoader([batch] * batches, batch_size=None)  # type: ignore[arg-type]


def trainer(*callbacks: Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_precisions_without_fp32_weights_are_refused(precision: str) -> None:
    sentence = f"trainer.precision is {precision}, but weights, codes and losses need fp32: set it to bf16-mixed"
    with pytest.raises(UserError, match=sentence):
        trainer(precision=precision, max_steps=1).fit(LitDVAE(CONFIG, learning_rate=1e-3), loader())


class Rates(Callback):
    """Records the learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *arguments: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_number_is_a_constant_learning_rate() -> None:
    rates = Rates()
    trainer(rates, max_steps=3).fit(LitDVAE(CONFIG, learning_rate=2e-3), loader())
    assert rates.rates == pytest.approx([2e-3] * 3)


def test_schedules_are_as_long_as_a_fit_given_in_epochs() -> None:
    """Two epochs of three batches, two accumulated for each step: four steps."""
    rates, module = Rates(), LitDVAE(CONFIG, learning_rate=CosineAnneal(start=1.0, end=0.0))
    run = trainer(rates, max_epochs=2, accumulate_grad_batches=2)
    run.fit(module, loader())
    assert run.global_step == 4
    expected = CosineAnneal(start=1.0, end=0.0, num_steps=4)
    assert rates.rates == pytest.approx([expected(step) for step in (0, 0, 1, 2, 2, 3)])


@pytest.mark.parametrize("optimizer", [partial(AdamW, lr=0.1), partial(SGD, lr=0.5, momentum=0.9)])
def test_a_learning_rate_of_the_optimizer_is_refused(optimizer: Any) -> None:
    with pytest.raises(UserError, match=r"the optimizer has lr=0\.., but model.learning_rate sets the learning rate"):
        trainer(max_steps=1).fit(LitDVAE(CONFIG, learning_rate=1e-3, optimizer=optimizer), loader())


class OwnAdam(Optimizer):
    """Optimizer whose learning rate has no default, so that it must be given one."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        return closure()


def test_an_optimizer_that_requires_a_learning_rate_may_get_one() -> None:
    rates = Rates()
    module = LitDVAE(CONFIG, learning_rate=1e-3, optimizer=partial(OwnAdam, lr=0.1))
    trainer(rates, max_steps=2).fit(module, loader())
    assert rates.rates == pytest.approx([1e-3] * 2)


class Nothing(LitDVAE):
    def configure_optimizers(self) -> Any:
        return "nothing usable"


def test_lightnings_error_about_an_unusable_optimizer_is_unchanged() -> None:
    with pytest.raises(pl.utilities.exceptions.MisconfigurationException, match="Unknown configuration for model opt"):
        trainer(max_steps=1).fit(Nothing(CONFIG), loader())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--trainer.val_check_interval", "100000"], "`val_check_interval` (100000) must be less than or equal"),
        (
            ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val/los",
             "--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "1.0",
             "--trainer.limit_train_batches", "2"],
            "Early stopping conditioned on metric `val/los` which is not available",
        ),
        (["--model.optimizer", "SGD", "--model.optimizer.lr", "0.1"], "the optimizer has lr=0.1, but"),
        (["--trainer.precision", "bf16-true"], "trainer.precision is bf16-true, but"),
    ],
)  # fmt: skip
def test_wrong_options_on_the_command_line_end_in_one_sentence(
    tiny_run: dict[str, Path], tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(tiny_run["dvae"].read_text())
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    if "100000" in options:
        del config["trainer"]["check_val_every_n_epoch"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(tmp_path / "config.yaml"), *options])
    assert ended.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_fit_without_a_logger_leaves_the_users_config_as_it_is(
    tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tiny_run["dvae"].read_text()
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "config.yaml", "--trainer.logger", "false", "--trainer.max_steps", "1"])
    assert (tmp_path / "config.yaml").read_text() == text
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


class FolderLogger(CSVLogger):
    """Logger with a folder for the run, but no `log_dir`, like W&B's."""

    log_dir = None  # type: ignore[assignment]
    experiment = None  # type: ignore[assignment]

    def log_metrics(self, *arguments: Any) -> None:
        pass

    log_hyperparams = save = finalize = log_metrics  # type: ignore[assignment]


def test_the_config_of_a_run_lies_above_its_checkpoints(
    tiny_run: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's loggers have no `log_dir`, for which Lightning takes the current folder."""
    config, text = yaml.safe_load(tiny_run["dvae"].read_text()), "the user's own"
    logger = {"class_path": "test_trainer_options.FolderLogger", "init_args": {"save_dir": "runs", "version": "first"}}
    config["trainer"] |= {"logger": logger, "max_steps": 1, "callbacks": config["trainer"]["callbacks"][-1:]}
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "fit.yaml"])
    assert (tmp_path / "config.yaml").read_text() == text
    run = tmp_path / "runs" / "lightning_logs" / "first"
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 1
    assert (run / "checkpoints" / "last.ckpt").is_file()


def test_a_command_replaces_the_optimizer_of_a_config_by_one_with_another_default(
    tiny_run: dict[str, Path], tmp_path: Path
) -> None:
    """jsonargparse keeps AdamW's default learning rate, which the new optimizer does not have."""
    options = ["--trainer.max_steps", "1", "--trainer.logger.init_args.save_dir", str(tmp_path)]
    main(["fit", "--config", str(tiny_run["dvae"]), "--model.optimizer", "torch.optim.RMSprop", *options])
    checkpoint = torch.load(tmp_path / "dvae/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["alpha"] == 0.99
