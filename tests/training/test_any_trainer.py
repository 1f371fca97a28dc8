"""Every model under every kind of Trainer: the command line, a plain script, a subclass with its own optimizer.

Each model is fitted once in each way; the other actions use the checkpoint of that fit.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import save
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_dalle.checkpoints import dvae_metadata, load_dalle, read_checkpoint
from lightning_dalle.cli import main
from lightning_dalle.data.loading.examples import Batch
from lightning_dalle.errors import UserError
from lightning_dalle.models.clip import CLIPConfig
from lightning_dalle.models.dvae import DVAE, DVAEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.tokenizer import CaptionTokenizer
from lightning_dalle.training.callbacks.checkpointing import LastCheckpoint
from lightning_dalle.training.lit_clip import LitCLIP
from lightning_dalle.training.lit_dalle import LitDALLE
from lightning_dalle.training.lit_dvae import LitDVAE
from lightning_dalle.training.lit_module import LitModule

MODELS: dict[str, type[LitModule]] = {"dvae": LitDVAE, "dalle": LitDALLE, "clip": LitCLIP}
DVAE_CONFIG = DVAEConfig(image_size=32, codebook_size=11, n_group=3, n_block=1, n_hid=8, n_init=8)
CLIP_CONFIG = CLIPConfig(
    image_size=32, patch_size=16, vision_width=16, vision_layers=1, text_width=16, text_layers=1, head_width=8,
    embed_dim=8, text_len=12,
)  # fmt: skip
TOKENIZER = CaptionTokenizer.train(["a cat"], vocab_size=256, text_len=6)


def batch(seed: int) -> Batch:
    """Return a batch as a user's own loader may yield it: images in uint8, and captions."""
    captions = ["a cat", "a dog"]
    ids = [TOKENIZER.pad(TOKENIZER.encode(caption))[0] for caption in captions]
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Batch(images, torch.tensor(ids), torch.zeros(2, dtype=torch.bool), captions, ["0", "1"])


def loader() -> DataLoader[Any]:
    return DataLoader([batch(i) for i in range(3)], batch_size=None)  # type: ignore[arg-type]


class OwnData(pl.LightningDataModule):
    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = staticmethod(loader)


class OwnOptimizer:
    """Mixin of a user's subclass."""

    def configure_optimizers(self) -> Optimizer:
        return SGD(self.trained.parameters(), lr=1e-3)  # type: ignore[attr-defined]


class OwnDVAE(OwnOptimizer, LitDVAE):
    pass


class OwnDALLE(OwnOptimizer, LitDALLE):
    pass


class OwnCLIP(OwnOptimizer, LitCLIP):
    pass


OWN: dict[str, type[LitModule]] = {"dvae": OwnDVAE, "dalle": OwnDALLE, "clip": OwnCLIP}


class Way:
    """One way to run the actions on one kind of model, in one folder."""

    def __init__(self, kind: str, folder: Path, dvae: Path) -> None:
        self.kind, self.folder, self.dvae = kind, folder, dvae
        self.checkpoint = folder / "checkpoints" / "last.ckpt"

    def fit(self, steps: int, resume: bool = False) -> None:
        ckpt_path = str(self.checkpoint) if resume else None
        self.trainer(max_steps=steps).fit(self.module(), **self.data("train", "val"), ckpt_path=ckpt_path)

    def evaluate(self, action: str) -> None:
        module = self.module().load_from_checkpoint(self.checkpoint)
        (metrics,) = getattr(self.trainer(), action)(module, **self.data(action))
        assert metrics

    def predict(self) -> None:
        predicted = self.trainer().predict(self.load(), **self.data("predict"))
        assert predicted is not None
        shapes = {"dvae": (2, 8, 8), "dalle": (2, 3, 32, 32)}
        for found in predicted:
            if self.kind == "clip":
                assert [embeddings.shape for embeddings in found] == [(2, 8), (2, 8)]
            else:
                assert isinstance(found, Tensor)
                assert found.shape == shapes[self.kind]

    def load(self) -> LitModule:
        return self.cls().load_from_checkpoint(str(self.checkpoint))

    def cls(self) -> type[LitModule]:
        return MODELS[self.kind]

    def module(self) -> LitModule:
        """Return a new module, with paths as texts and a plain number as learning rate."""
        torch.manual_seed(0)
        if self.kind == "dvae":
            return self.cls()(config=DVAE_CONFIG, learning_rate=1e-3)
        if self.kind == "clip":
            return self.cls()(config=CLIP_CONFIG, learning_rate=1e-3)
        return self.cls()(
            config=TransformerConfig(n_layer=2, n_head=2, n_embd=16), dvae_checkpoint=str(self.dvae),
            learning_rate=CosineAnneal(start=1e-3, end=1e-4, num_steps=9), text_len=6, text_vocab_size=256,
            tokenizer=TOKENIZER, optimizer=partial(AdamW, betas=(0.8, 0.9)),
        )  # fmt: skip

    def trainer(self, **options: Any) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu", logger=False, default_root_dir=self.folder, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, callbacks=[LastCheckpoint(every_n_train_steps=100)],
            **options,
        )  # fmt: skip

    def data(self, *stages: str) -> dict[str, Any]:
        return {
            {"train": "train_dataloaders", "val": "val_dataloaders"}.get(s, "dataloaders"): loader() for s in stages
        }


class Subclass(Way):
    def cls(self) -> type[LitModule]:
        return OWN[self.kind]

    def data(self, *stages: str) -> dict[str, Any]:
        return {"datamodule": OwnData()}


class CommandLine(Way):
    def __init__(self, kind: str, folder: Path, dvae: Path) -> None:
        super().__init__(kind, folder, dvae)
        template = (Path(__file__).parents[1] / "tiny" / f"{kind}.yaml").read_text()
        values = yaml.safe_load(template.replace("SAVE_DIR/dvae/checkpoints/last.ckpt", str(dvae)))
        values["trainer"] |= {"logger": False, "default_root_dir": str(folder), "limit_val_batches": 1}
        callback = "lightning_dalle.training.callbacks.checkpointing.LastCheckpoint"
        values["trainer"]["callbacks"] = [{"class_path": callback, "init_args": {"every_n_train_steps": 100}}]
        if kind == "clip":
            del values["model"]["init_args"]["reconstruction_augment"]
        if kind == "dalle":
            values["model"]["init_args"]["learning_rate"] = 0.001
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(values))

    def run(self, action: str, *more: str) -> None:
        main([action, "--config", str(self.config), *more])

    def fit(self, steps: int, resume: bool = False) -> None:
        self.run("fit", "--trainer.max_steps", str(steps), *(("--ckpt_path", str(self.checkpoint)) if resume else ()))

    def evaluate(self, action: str) -> None:
        self.run(action, "--ckpt_path", str(self.checkpoint), f"--trainer.limit_{action[:4].rstrip('i')}_batches", "1")

    def predict(self) -> None:
        writer = "lightning_dalle.training.callbacks.codes_writer.CodesWriter"
        values = yaml.safe_load(self.config.read_text())
        writes = {"class_path": writer, "init_args": {"path": str(self.folder / "codes"), "crops": {"val": 1}}}
        values["trainer"]["callbacks"] = [writes] if self.kind == "dvae" else []
        config = self.folder / "predict.yaml"
        config.write_text(yaml.safe_dump(values))
        predict = ["predict", "--config", str(config), "--ckpt_path", str(self.checkpoint)]
        if self.kind == "dvae":
            main(predict)
            assert list((self.folder / "codes").glob("val-*.parquet"))
        else:
            with pytest.raises(SystemExit) as ended:
                main(predict)
            assert ended.value.code == 2


WAYS: dict[str, type[Way]] = {"cli": CommandLine, "script": Way, "subclass": Subclass}


@pytest.fixture(scope="module", params=[f"{kind}-{way}" for kind in MODELS for way in WAYS])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Way]:
    """Fit one kind of model in one way for one epoch of its own loader."""
    kind, name = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    dvae = DVAE(DVAE_CONFIG)
    state = {f"dvae.{key}": value for key, value in dvae.state_dict().items()}
    torch.save({"state_dict": state, **dvae_metadata(dvae)}, folder / "dvae.ckpt")
    way = WAYS[name](kind, folder, folder / "dvae.ckpt")
    way.fit(steps=3)
    return way


def test_fit_keeps_the_last_step(way: Way) -> None:
    checkpoint = read_checkpoint(way.checkpoint)
    assert checkpoint["global_step"] == 3
    assert checkpoint["hyper_parameters"]


@pytest.mark.parametrize("action", ["validate", "test"])
def test_losses_are_computed(way: Way, action: str) -> None:
    way.evaluate(action)


def test_predict(way: Way) -> None:
    way.predict()


def test_load_from_checkpoint_gives_the_weights_and_the_hyperparameters(way: Way) -> None:
    module, saved = way.load(), read_checkpoint(way.checkpoint)
    assert set(module.state_dict()) == set(saved["state_dict"])
    assert all(torch.equal(value, saved["state_dict"][name]) for name, value in module.state_dict().items())
    assert dict(module.hparams) == saved["hyper_parameters"] | (
        {"dvae_checkpoint": str(way.checkpoint)} if way.kind == "dalle" else {}
    )
    if way.kind == "dalle":
        assert isinstance(module, LitDALLE)
        assert module.tokenizer is not None


def test_resume_equals_an_unbroken_run(way: Way, tmp_path: Path) -> None:
    unbroken = type(way)(way.kind, tmp_path, way.dvae)
    unbroken.fit(steps=5)
    way.fit(steps=5, resume=True)
    states = [read_checkpoint(run.checkpoint)["state_dict"] for run in (unbroken, way)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.fixture
def dvae_of_32(tmp_path: Path) -> Path:
    return save(tmp_path / "dvae_of_32.ckpt", dvae_metadata(DVAE(DVAE_CONFIG)), dvae=DVAE(DVAE_CONFIG))


def dalle(dvae: Path, tokenizer: CaptionTokenizer | None = None, **sizes: int) -> LitDALLE:
    shape = {"text_len": 6, "text_vocab_size": 256, **sizes}
    return LitDALLE(TransformerConfig(n_layer=2, n_head=2, n_embd=16), dvae, 1e-3, tokenizer=tokenizer, **shape)


def fit_on(module: LitModule, batches: list[Any], **options: Any) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False, **options
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda b: b.images,
            "needs batches of the class lightning_dalle.data.loading.examples.Batch, but the loader yie",
        ),
        (lambda b: [b.images], "but the loader yields list: collate its examples to a Batch"),
        (lambda b: b._replace(images=b.images.float()), "the images have values from 0 to 255, but floats must be in"),
        (
            lambda b: b._replace(images=b.images[..., :16, :16]),
            "images have 16x16 pixels, but the dVAE needs 32x32",
        ),
        (lambda b: b._replace(text_tokens=b.text_tokens[:, :4]), "captions have 4 tokens, but text_len is 6: set both"),
        (
            lambda b: b._replace(text_tokens=b.text_tokens + 256),
            "all must be below 262: set text_vocab_size to",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused(change: Any, sentence: str, dvae_of_32: Path) -> None:
    modules: list[LitModule] = [dalle(dvae_of_32)]
    if "caption" not in sentence and "all must" not in sentence:
        modules.append(LitDVAE(DVAE_CONFIG, learning_rate=1e-3))
    for module in modules:
        with pytest.raises(UserError, match=sentence):
            fit_on(module, [change(batch(0))], enable_checkpointing=False)


def test_a_dalle_trained_without_a_tokenizer_is_loaded_but_does_not_sample(dvae_of_32: Path, tmp_path: Path) -> None:
    trainer = fit_on(dalle(dvae_of_32), [batch(0)], default_root_dir=tmp_path)
    (file,) = (tmp_path / "checkpoints").glob("*.ckpt")
    loaded = LitDALLE.load_from_checkpoint(file)
    assert loaded.tokenizer is None
    assert trainer.validate(loaded, loader(), verbose=False)[0]["val/loss"] > 0
    with pytest.raises(UserError, match="sampling needs the captions' tokenizer"):
        loaded.pipeline()
    with pytest.raises(UserError, match=r"has no tokenizer, as sampling needs: train with LitDALLE"):
        load_dalle(file)
