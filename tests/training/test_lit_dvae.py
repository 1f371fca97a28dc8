"""Schedules of the dVAE's training."""

import pytest
from pytorch_lightning import Trainer

from lightning_dalle.models.dvae import DVAEConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.lit_dvae import LitDVAE


def test_schedules_span_max_steps_of_each_fit() -> None:
    module = LitDVAE(
        DVAEConfig(image_size=16, codebook_size=4, n_group=2, n_block=1, n_hid=4, n_init=4),
        learning_rate=CosineAnneal(start=1e-3, end=1e-5),
        temperature=CosineAnneal(start=1.0, end=0.25, fraction=0.5),
        kl_weight=CosineAnneal(start=0.0, end=2.0, num_steps=8),
    )
    for steps in (100, 40):
        module.trainer = Trainer(max_steps=steps, accelerator="cpu", logger=False)
        rate, *_ = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas
        temperature, kl_weight = module.for_this_fit(module.temperature), module.for_this_fit(module.kl_weight)
        assert [temperature(step) for step in (0, steps // 2 - 1, steps // 2)] == pytest.approx(
            [1.0, 0.25, 0.25], abs=0.01
        )
        assert temperature(steps // 4) > 0.5
        assert [rate(step) for step in (0, steps)] == pytest.approx([1.0, 0.01])
        assert kl_weight(8) == 2.0
