"""Callbacks in runs that they cannot serve: refused before the first step."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning import Callback

from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.training.callbacks.codes_writer import CodesWriter
from lightning_dalle.training.callbacks.reconstruction import ReconstructionEvaluation
from lightning_dalle.training.callbacks.visualization import GradientScaleCurves, Reconstructions, SampleGrid
from lightning_dalle.training.callbacks.zero_shot import ZeroShotEvaluation


@pytest.mark.parametrize(
    ("callback", "model"),
    [
        (Reconstructions(), "LitDVAE"),
        (SampleGrid(["a cat"]), "LitDALLE"),
        (CodesWriter(Path("codes"), {"train": 1}), "LitDVAE"),
        (ZeroShotEvaluation(Protocol(name="p")), "LitDALLE"),
        (ReconstructionEvaluation(Protocol(name="p")), "LitDVAE"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_callback_refuses_another_kind_of_model(callback: Callback, model: str, stage: str) -> None:
    name = type(callback).__name__
    sentence = f"{name} needs a {model}, but the model is a LightningModule: remove {name} from trainer.callbacks"
    with pytest.raises(UserError, match=sentence):
        callback.setup(pl.Trainer(accelerator="cpu", logger=False), pl.LightningModule(), stage)


def test_gradient_scale_curves_refuse_a_run_without_gradient_scales() -> None:
    with pytest.raises(UserError, match="which this run does not use: remove GradientScaleCurves from"):
        GradientScaleCurves().setup(pl.Trainer(accelerator="cpu", logger=False), pl.LightningModule(), "fit")
