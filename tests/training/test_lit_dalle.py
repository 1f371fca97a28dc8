"""Inputs and targets of the transformer in training, and when its checkpoints are saved."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.testing import assert_close

from lightning_dalle.data.datamodule import Batch
from lightning_dalle.errors import UserError
from lightning_dalle.models.dvae import DVAE
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.lit_dalle import LitDALLE, check_checkpoint_order


def lit(code_corruption: float = 0.0) -> LitDALLE:
    return LitDALLE(
        TransformerConfig(n_layer=1, n_head=1, n_embd=8),
        Path("unread.ckpt"),
        CosineAnneal(start=1e-3, end=1e-4, num_steps=10),
        code_corruption=code_corruption,
    )


def test_corrupted_codes_come_from_another_image_at_the_same_position() -> None:
    codes = torch.arange(8)[:, None] * 1000 + torch.arange(256)
    corrupted = lit(0.25)._corrupt(codes, batch_idx=0)
    changed = corrupted != codes
    assert abs(float(changed.float().mean()) - 0.25) < 0.03
    assert torch.equal(corrupted[changed], codes.roll(1, dims=0)[changed])
    assert torch.equal(corrupted, lit(0.25)._corrupt(codes, batch_idx=0)), "a repeated step is the same"
    assert not torch.equal(corrupted, lit(0.25)._corrupt(codes, batch_idx=1))


def test_codes_are_unchanged_without_corruption() -> None:
    codes = torch.randint(32, (4, 16))
    assert torch.equal(lit(0.0)._corrupt(codes, batch_idx=0), codes)


def test_soft_targets_are_the_distribution_of_the_sampled_codes(dvae: DVAE) -> None:
    module = lit()
    module.dvae = dvae
    batch = Batch(torch.rand(64, 3, 16, 16), torch.zeros(64, 6).long(), torch.zeros(64).bool(), ["a"] * 64, ["0"] * 64)
    codes, targets = module._sample_codes(batch, batch_idx=0)
    assert_close(targets, dvae.encoder_logits(batch.images).softmax(1).flatten(2).movedim(1, 2))
    sampled = torch.nn.functional.one_hot(codes, 11).float().mean((0, 1))
    assert_close(sampled, targets.mean((0, 1)), atol=0.05, rtol=0)
    assert torch.equal(codes, module._sample_codes(batch, batch_idx=0)[0]), "a repeated step is the same"
    assert not torch.equal(codes, module._sample_codes(batch, batch_idx=1)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_train_steps": 5}, "every_n_train_steps=5 of"),
        ({"train_time_interval": timedelta(hours=1)}, "train_time_interval=1:00:00 of"),
        ({"every_n_epochs": 1}, None),
        ({}, None),
    ],
)
def test_halve_on_plateau_needs_checkpoints_after_validations(
    options: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    saves = ModelCheckpoint(tmp_path, **options)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[saves])
    if words is None:
        return check_checkpoint_order(trainer)
    with pytest.raises(
        UserError, match=f"needs checkpoints after validations, but {words} ModelCheckpoint saves before them; remove"
    ):
        check_checkpoint_order(trainer)
    return None
