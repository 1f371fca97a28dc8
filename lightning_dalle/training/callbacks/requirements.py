"""Requirements of callbacks, checked before the first step."""

import pytorch_lightning as pl
from pytorch_lightning import Callback

from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.errors import UserError


def require_model(callback: Callback, pl_module: pl.LightningModule, kind: type[pl.LightningModule]) -> None:
    """Raise a UserError if the model is not of the kind that a callback needs."""
    if not isinstance(pl_module, kind):
        raise UserError(
            f"{type(callback).__name__} needs a {kind.__name__}, but the model is a {type(pl_module).__name__}: remove "
            f"{type(callback).__name__} from trainer.callbacks"
        )


def require_data(callback: Callback, trainer: pl.Trainer) -> CaptionedImageDataModule:
    """Return the run's CaptionedImageDataModule; raise a UserError if it reads its data otherwise."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, CaptionedImageDataModule):
        raise UserError(
            f"{type(callback).__name__} needs a CaptionedImageDataModule, but the run has "
            f"{'no DataModule' if data is None else f'a {type(data).__name__}'}: remove {type(callback).__name__} from "
            "trainer.callbacks"
        )
    return data
