"""A resumed fit equals an unbroken one, and nothing that a run has saved is lost to another run or to an error."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import save
from datasets import DatasetDict, IterableDatasetDict
from forms import dataset, squares
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from test_any_trainer import CLIP_CONFIG, DVAE_CONFIG, TOKENIZER, batch, dalle, loader
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_dalle.checkpoints import dvae_metadata, read_checkpoint
from lightning_dalle.cli import main
from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.loading.examples import Batch
from lightning_dalle.data.loading.loader import ResumableLoader
from lightning_dalle.data.sources.captioned import CaptionedImages
from lightning_dalle.errors import UserError
from lightning_dalle.inference.pipeline import TextToImage
from lightning_dalle.models.dvae import DVAE, DVAEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.tokenizer import CaptionTokenizer
from lightning_dalle.training.callbacks.checkpointing import LastCheckpoint
from lightning_dalle.training.lit_clip import LitCLIP
from lightning_dalle.training.lit_dalle import LitDALLE
from lightning_dalle.training.lit_dvae import LitDVAE
from lightning_dalle.training.lit_module import LitModule, describe

ROWS = DatasetDict({"train": dataset(squares(24)), "val": dataset(squares(16))})
STREAMS = IterableDatasetDict({name: rows.to_iterable_dataset(4) for name, rows in ROWS.items()})
DECAYING = CosineAnneal(start=1e-2, end=0.0, warmup_steps=2)
"""Schedule that lasts as long as the fit."""


@pytest.fixture
def dvae_file(tmp_path: Path) -> Path:
    dvae = DVAE(DVAE_CONFIG)
    return save(tmp_path / "dvae.ckpt", dvae_metadata(dvae), dvae=dvae)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False, num_sanity_val_steps=0,
        enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip


def data_of(path: Any) -> CaptionedImageDataModule:
    source = CaptionedImages(path=path, splits={"train": "train", "val": "val"})
    sizes = {"image_size": 32, "batch_size": 8, "text_len": 6, "vocab_size": 260}
    return CaptionedImageDataModule(source, epoch_length=24, shuffle_buffer=5, **sizes)


class Seen(Callback):
    """List of the ids of the records in the training batches."""

    def __init__(self) -> None:
        self.ids: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int) -> None:
        self.ids += batch.ids


def module_of(kind: str, dvae_file: Path) -> LitModule:
    torch.manual_seed(0)
    if kind == "dvae":
        return LitDVAE(DVAE_CONFIG, DECAYING, temperature=CosineAnneal(start=1.0, end=0.1))
    if kind == "clip":
        return LitCLIP(CLIP_CONFIG, DECAYING)
    shape = TransformerConfig(n_layer=1, n_head=2, n_embd=16)
    return LitDALLE(shape, dvae_file, DECAYING, text_len=6, text_vocab_size=260)


@pytest.mark.parametrize(
    ("kind", "path"), [("dvae", ROWS), ("dvae", STREAMS), ("dalle", ROWS), ("clip", ROWS)],
    ids=["dvae", "dvae-streamed", "dalle", "clip"],
)  # fmt: skip
def test_a_fit_of_max_epochs_resumes_exactly_from_every_step(
    kind: str, path: Any, dvae_file: Path, tmp_path: Path
) -> None:
    """The learning rate lasts as long as the fit, whose length depends on that of the data."""

    def fit(folder: Path, ckpt_path: Path | None = None) -> tuple[list[str], LitModule]:
        data, seen = data_of(path), Seen()
        steps = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        module = module_of(kind, dvae_file)
        trainer(folder, seen, steps, max_epochs=3).fit(module, data, ckpt_path=ckpt_path)
        return seen.ids, module

    seen, unbroken = fit(tmp_path)
    assert len(seen) == 72
    assert unbroken.trainer.optimizers[0].param_groups[0]["lr"] == 0
    for step in range(1, 9):
        seen_after, resumed = fit(tmp_path / "resumed", tmp_path / f"step={step}.ckpt")
        assert seen_after == seen[8 * step :]
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in unbroken.state_dict().items())


def test_max_epochs_of_a_stream_without_a_length_need_num_steps(tmp_path: Path) -> None:
    class Stream(IterableDataset[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            yield batch(0)

    fit = trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit
    with pytest.raises(UserError, match=r"whose number of steps is unknown: set trainer\.max_steps"):
        fit(LitDVAE(DVAE_CONFIG, DECAYING), DataLoader(Stream(), batch_size=None))


class OwnConstructor(LitDVAE):
    def __init__(self, codebook_size: int = 11) -> None:
        shape = DVAEConfig(image_size=32, codebook_size=codebook_size, n_group=3, n_block=1, n_hid=8, n_init=8)
        super().__init__(shape, learning_rate=1e-3)


def test_a_subclass_with_its_own_constructor_is_loaded(tmp_path: Path) -> None:
    module = OwnConstructor()
    trainer(tmp_path, LastCheckpoint(9), max_steps=1).fit(module, loader())
    loaded = OwnConstructor.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.state_dict().items())
    with pytest.raises(UserError, match=r"last\.ckpt: this config has codebook_size=12 \(checkpoint: 11\)"):
        OwnConstructor.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt", codebook_size=12)


def test_a_loaded_model_continues_from_its_own_weights_instead_of_init_from(tmp_path: Path, dvae_file: Path) -> None:
    first = LitDVAE(DVAE_CONFIG, learning_rate=1e-2, init_from=dvae_file)
    trainer(tmp_path / "first", LastCheckpoint(9), max_steps=3).fit(first, loader())
    loaded = LitDVAE.load_from_checkpoint(tmp_path / "first" / "checkpoints" / "last.ckpt", learning_rate=0.0)
    trainer(tmp_path / "second", max_steps=1, enable_checkpointing=False).fit(loaded, loader())
    assert all(torch.equal(value, loaded.dvae.state_dict()[name]) for name, value in first.dvae.state_dict().items())


@pytest.mark.parametrize("action", ["fit", "validate"])
def test_data_with_another_tokenizer_than_the_model_is_refused(action: str, dvae_file: Path, tmp_path: Path) -> None:
    other = CaptionTokenizer.train(["a cat and a dog and a bird"], vocab_size=260, text_len=6)
    model = dalle(dvae_file, TOKENIZER, text_vocab_size=260)
    batches = DataLoader([batch(0)._replace(tokenizer=other)], batch_size=None)  # type: ignore[arg-type]
    run = getattr(trainer(tmp_path, max_steps=1, enable_checkpointing=False), action)
    if action == "fit":  # the tokens of `TOKENIZER`, which are bytes, have the same ids in every tokenizer
        run(model, batches)
        assert model.tokenizer is other
    model.tokenizer = CaptionTokenizer.train(["other words"], vocab_size=260, text_len=6)
    with pytest.raises(UserError, match="the data has another tokenizer than the model"):
        getattr(trainer(tmp_path, max_steps=1, enable_checkpointing=False), action)(model, batches)


def test_a_resume_that_fails_before_its_first_step_leaves_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    module, last = LitDVAE(DVAE_CONFIG, learning_rate=1e-3), tmp_path / "checkpoints" / "last.ckpt"
    trainer(tmp_path, LastCheckpoint(9), max_steps=2).fit(module, data_of(ROWS))
    content = last.read_bytes()
    with pytest.raises(UserError, match="it was not streamed, but is now"):
        trainer(tmp_path, LastCheckpoint(9), max_steps=9).fit(module, data_of(STREAMS), ckpt_path=last)
    assert last.read_bytes() == content


def test_a_fit_does_not_overwrite_the_checkpoint_of_another(tmp_path: Path) -> None:
    module, last = LitDVAE(DVAE_CONFIG, learning_rate=1e-3), tmp_path / "checkpoints" / "last.ckpt"
    trainer(tmp_path, LastCheckpoint(9), max_steps=2).fit(module, loader())
    content = last.read_bytes()
    with pytest.raises(UserError, match=r"last\.ckpt is of an earlier run, which this one would overwrite: resume it"):
        trainer(tmp_path, LastCheckpoint(9), max_steps=3).fit(module, loader())
    assert last.read_bytes() == content
    trainer(tmp_path, LastCheckpoint(9), fast_dev_run=True).fit(module, loader())
    twice = trainer(tmp_path, LastCheckpoint(9), max_steps=3)
    twice.fit(module, loader(), ckpt_path=last)
    twice.fit_loop.epoch_loop.max_steps = 4
    twice.fit(module, loader())
    assert read_checkpoint(last)["global_step"] == 4


def test_a_loader_checks_its_state_before_it_takes_it() -> None:
    data = data_of(STREAMS)
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    for state, sentence in (
        ({"epoch": 3, "num_batches": 2}, "it was not streamed, but is now; set data.source as it was"),
        ({"epoch": 3, "num_batches": 2, "ranks": [[None], [None]]}, "was written by 2 processes with 1 workers"),
    ):
        with pytest.raises(UserError, match=sentence):
            loader.load_state_dict(state)
        assert (loader.epoch, loader.num_batches, loader.is_resumed) == (0, 0, False)


def test_a_resume_amid_an_epoch_checks_its_first_batch(dvae_file: Path, tmp_path: Path) -> None:
    known, other = (CaptionTokenizer.train([text], vocab_size=260, text_len=6) for text in ("a cat cat", "so so odd"))
    steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    for tokenizer, end, ckpt_path in ((known, 2, None), (other, 4, tmp_path / "step=2.ckpt")):
        batches = [batch(i)._replace(tokenizer=tokenizer) for i in range(4)]
        run = trainer(tmp_path, steps, max_steps=end)
        model = dalle(dvae_file, text_vocab_size=260)
        if ckpt_path is None:
            run.fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
            continue
        with pytest.raises(UserError, match="the data has another tokenizer than the model"):
            run.fit(model, DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)  # type: ignore[arg-type]


def test_a_refused_fit_leaves_the_config_of_the_earlier_run(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    config = yaml.safe_load(tiny_run["dvae"].read_text())
    callback = "lightning_dalle.training.callbacks.checkpointing.LastCheckpoint"
    config["trainer"]["callbacks"] = [{"class_path": callback, "init_args": {"every_n_train_steps": 9}}]
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config", str(tmp_path / "fit.yaml"), "--trainer.limit_val_batches", "0"]
    main([*fit, "--trainer.max_steps", "1"])
    saved = (tmp_path / "dvae" / "config.yaml").read_text()
    assert yaml.safe_load(saved)["trainer"]["max_steps"] == 1
    with pytest.raises(SystemExit) as ended:
        main([*fit, "--trainer.max_steps", "2"])
    assert ended.value.code == 2
    assert (tmp_path / "dvae" / "config.yaml").read_text() == saved


def test_a_resume_amid_accumulated_gradients_saves_nothing_before_their_step(tmp_path: Path) -> None:
    """The resumed step 2 is one at which a checkpoint is due."""
    last, counts = tmp_path / "checkpoints" / "last.ckpt", []
    for step, ckpt_path in ((2, None), (3, last)):
        saved = Saved()
        run = trainer(tmp_path, saved, LastCheckpoint(2), max_steps=step, accumulate_grad_batches=2)
        run.fit(LitDVAE(DVAE_CONFIG, 1e-3), data_of(ROWS), ckpt_path=ckpt_path)
        counts.append(saved.steps)
    assert counts == [[2], [3]]


def test_ctrl_c_in_a_validation_amid_accumulated_gradients_waits_for_their_step(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 2, "val_check_interval": 1, "check_val_every_n_epoch": None}
    interrupted = Terminated(signal.SIGINT, step=0)
    run = trainer(tmp_path, interrupted, LastCheckpoint(99), max_steps=4, **options)
    with pytest.raises(SystemExit):
        run.fit(LitDVAE(DVAE_CONFIG, 1e-3), data_of(ROWS))
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 1


class OwnOptimizerSettings(LitDVAE):
    def __init__(self, optimizer: dict[str, float]) -> None:
        super().__init__(DVAE_CONFIG, 1e-3)
        self.save_hyperparameters()

    def configure_optimizers(self) -> Optimizer:  # type: ignore[override]
        return SGD(self.parameters(), **self.hparams["optimizer"])


def test_a_subclass_may_have_an_argument_optimizer_of_its_own(tmp_path: Path) -> None:
    for steps in (1, 2):
        last = tmp_path / "checkpoints" / "last.ckpt"
        run = trainer(tmp_path, LastCheckpoint(9), max_steps=steps)
        run.fit(OwnOptimizerSettings({"lr": 1e-3}), loader(), ckpt_path=last if last.exists() else None)
    assert read_checkpoint(last)["global_step"] == 2


def test_a_resumed_run_that_fails_names_the_checkpoint_that_it_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer(tmp_path, LastCheckpoint(9), max_steps=1).fit(LitDVAE(DVAE_CONFIG, 1e-3), loader())
    last = tmp_path / "checkpoints" / "last.ckpt"
    monkeypatch.setattr(LitDVAE, "training_step", lambda *arguments: 1 / 0)
    with caplog.at_level("INFO"), pytest.raises(ZeroDivisionError):
        trainer(tmp_path, LastCheckpoint(9), max_steps=2).fit(LitDVAE(DVAE_CONFIG, 1e-3), loader(), ckpt_path=last)
    assert f"the run was interrupted at step 1: resume from step 1 with --ckpt_path {last}" in caplog.text


class Saved(Callback):
    """List of the steps at which a checkpoint was saved."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: pl.Trainer, *args: Any) -> None:
        self.steps.append(trainer.global_step)


class Stopped(Saved):
    """Asks for the end of the fit after its first step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(("option", "step"), [({"min_steps": 4}, 4), ({"min_epochs": 2}, 6)], ids=str)
def test_a_fit_that_must_not_stop_yet_saves_only_its_end(option: dict[str, int], step: int, tmp_path: Path) -> None:
    stopped = Stopped()
    trainer(tmp_path, stopped, LastCheckpoint(99), max_epochs=9, **option).fit(LitDVAE(DVAE_CONFIG, 1e-3), loader())
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == step
    assert stopped.steps == [step]


class Terminated(Callback):
    """Sends a signal once, in the first batch of the validation after a step."""

    def __init__(self, number: int, step: int = 2) -> None:
        self.number, self.step = number, step

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, index: int, loader: int = 0
    ) -> None:
        if trainer.global_step == self.step and index == 0:
            self.step = -1
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_a_validation_saves_trained_and_averaged_weights_each_in_their_place(
    number: int, tmp_path: Path
) -> None:
    def fit(folder: Path, *more: Callback, ckpt_path: Path | None = None) -> dict[str, Any]:
        torch.manual_seed(0)
        callbacks = [EMAWeightAveraging(decay=0.5), LastCheckpoint(99), *more]
        run = trainer(folder, *callbacks, max_steps=4, val_check_interval=2, check_val_every_n_epoch=None)
        run.fit(LitDVAE(DVAE_CONFIG, 1e-3), data_of(ROWS), ckpt_path=ckpt_path)
        return read_checkpoint(folder / "checkpoints" / "last.ckpt")

    unbroken, last = fit(tmp_path / "unbroken"), tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit):
        fit(tmp_path, Terminated(number))
    assert read_checkpoint(last)["global_step"] == 2
    resumed = fit(tmp_path, ckpt_path=last)
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, resumed[key][name]) for name, value in unbroken[key].items()), key


def test_ctrl_c_amid_accumulated_gradients_ends_the_fit_after_their_step(tmp_path: Path) -> None:
    class Interrupted(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 0:
                os.kill(os.getpid(), signal.SIGINT)

    run = trainer(tmp_path, Interrupted(), LastCheckpoint(99), max_steps=4, accumulate_grad_batches=2)
    with pytest.raises(SystemExit):
        run.fit(LitDVAE(DVAE_CONFIG, 1e-3), loader())
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 1
    assert run.fit_loop.epoch_loop.batch_progress.current.ready == 2


def test_a_users_datamodule_with_a_path_as_hyperparameter_gives_a_readable_checkpoint(tmp_path: Path) -> None:
    class Own(pl.LightningDataModule):
        def __init__(self, folder: Path) -> None:
            super().__init__()
            self.save_hyperparameters()

        train_dataloader = staticmethod(loader)

    trainer(tmp_path, LastCheckpoint(9), max_steps=1).fit(LitDVAE(DVAE_CONFIG, 1e-3), datamodule=Own(tmp_path))
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["datamodule_hyper_parameters"] == {"folder": str(tmp_path)}


def test_a_resume_with_another_optimizer_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, LastCheckpoint(9), max_steps=1).fit(LitDVAE(DVAE_CONFIG, 1e-3), loader())
    other, last = LitDVAE(DVAE_CONFIG, 1e-3, optimizer=SGD), tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"optimizer is torch.optim.sgd.SGD, but the checkpoint's is torch.optim.adamw"):
        trainer(tmp_path, LastCheckpoint(9), max_steps=2).fit(other, loader(), ckpt_path=last)


def choose(groups: Any, name: str, lr: float) -> Optimizer:
    return Adam(groups, lr) if name == "adam" else AdamW(groups, lr)


def test_a_function_that_makes_the_optimizer_is_described_by_its_name() -> None:
    described = describe(partial(choose, name="adam", lr=1e-3))
    assert described["class_path"].endswith("choose")
    assert describe(partial(choose, "adam"))["class_path"] == described["class_path"]
    assert describe(partial(lambda cls, groups: cls(groups), AdamW))["class_path"] == "torch.optim.adamw.AdamW"


def test_an_optimizer_without_a_learning_rate_is_refused(tmp_path: Path) -> None:
    class NoRate(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    with pytest.raises(UserError, match="NoRate has no argument lr with a default above 0"):
        trainer(tmp_path, max_steps=1, enable_checkpointing=False).fit(
            LitDVAE(DVAE_CONFIG, 1e-3, optimizer=NoRate), loader()
        )


def test_the_loss_of_training_steps_can_be_monitored_at_every_step(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="train/loss", every_n_train_steps=1)
    trainer(tmp_path, best, max_steps=2).fit(LitDVAE(DVAE_CONFIG, 1e-3), loader())
    assert best.best_model_score is not None


def test_predicted_images_are_seeded_by_record(
    dvae_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []

    def sample(self: TextToImage, requests: Any, *args: Any) -> Iterator[torch.Tensor]:
        seeds.extend(request.seed for request in requests)
        return iter([torch.zeros(3, 32, 32)] * len(requests))

    monkeypatch.setattr(TextToImage, "sample_images", sample)
    first, second = batch(0), batch(1)
    one = second._replace(
        images=second.images[:1], text_tokens=second.text_tokens[:1], captions=["a cat"], ids=["2"],
        is_truncated=second.is_truncated[:1],
    )  # fmt: skip
    for batches in ([first, one], [one, first]):
        trainer(tmp_path).predict(dalle(dvae_file, TOKENIZER), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert len(set(seeds[:3])) == 3
    assert seeds[3:] == [seeds[2], *seeds[:2]]
