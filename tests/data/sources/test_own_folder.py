"""Both models train on a folder of real photos in any format, given only its path."""

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
from forms import FORMATS, Photo, Splits

from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.sources.captioned import CaptionedImages
from lightning_dalle.models.dvae import DVAEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.lit_dalle import LitDALLE
from lightning_dalle.training.lit_dvae import LitDVAE


@pytest.fixture(scope="module")
def photos(real_data: Path) -> Splits:
    splits = {}
    for split, count in {"train": 8, "val": 4}.items():
        folder = real_data / "coco" / split
        records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()[:count]]
        splits[split] = [
            Photo((folder / record["file_name"]).read_bytes(), record["captions"], str(record["id"]))
            for record in records
        ]
    return splits


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_both_models_train(format: str, streaming: bool, photos: Splits, dvae_checkpoint: Path, tmp_path: Path) -> None:
    FORMATS[format](tmp_path / "mine", photos)
    data = CaptionedImageDataModule(
        CaptionedImages(path=str(tmp_path / "mine"), streaming=streaming),
        image_size=16, batch_size=4, text_len=6, vocab_size=300, epoch_length=8,
    )  # fmt: skip
    constant = CosineAnneal(start=1e-3, end=1e-3, num_steps=2)
    dvae = LitDVAE(
        DVAEConfig(image_size=16, codebook_size=11, n_group=3, n_block=1, n_hid=8, n_init=8),
        learning_rate=constant, temperature=constant, kl_weight=constant,
    )  # fmt: skip
    dalle = LitDALLE(
        TransformerConfig(n_layer=1, n_head=1, n_embd=8), dvae_checkpoint, constant, text_len=6, text_vocab_size=300
    )
    for model in (dvae, dalle):
        trainer = pl.Trainer(
            max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(model, data)
        assert trainer.global_step == 2
        assert trainer.callback_metrics["val/loss"].isfinite()
