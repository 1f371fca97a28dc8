"""Each model overfits one batch of real images and captions."""

import pytest
import torch

from lightning_dalle.data.datamodule import Batch, CaptionedImageDataModule
from lightning_dalle.data.sources.openmoji import OpenMoji
from lightning_dalle.losses import dalle_loss, dvae_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.dvae import DVAE, DVAEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.optim.param_groups import param_groups


@pytest.fixture(scope="module")
def batch() -> Batch:
    data = CaptionedImageDataModule(OpenMoji(), image_size=32, batch_size=8, text_len=24, vocab_size=512)
    data.setup("fit")
    return data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)


@pytest.mark.slow
def test_dvae_overfits_one_batch(batch: Batch) -> None:
    config = DVAEConfig(
        image_size=32,
        codebook_size=256,
        n_group=3,
        n_block=1,
        n_hid=32,
        min_log_scale=0.0,
        block_gain=1.0,
        center_inputs=True,
    )
    dvae = DVAE(config).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(dvae.parameters())
    learning_rate = CosineAnneal(start=3e-3, end=1e-5, num_steps=700, warmup_steps=30)
    temperature = CosineAnneal(start=1.0, end=1 / 16, num_steps=350)
    generator = torch.Generator().manual_seed(0)
    for step in range(700):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        logits, pixels = dvae(batch.images, temperature(step), generator)
        loss = dvae_loss(batch.images, logits, pixels, kl_weight=0.0, codebook_entropy_weight=0.01)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    error = (dvae.decode(dvae.encode(batch.images)) - batch.images).square().mean()
    error_of_the_mean_image = (batch.images.mean(dim=0) - batch.images).square().mean()
    assert error < error_of_the_mean_image / 2


def test_dalle_overfits_one_batch(batch: Batch) -> None:
    config = DALLEConfig(
        transformer=TransformerConfig(n_layer=4, n_head=4, n_embd=64),
        text_len=24, text_vocab_size=512, grid=4, codebook_size=32,
    )  # fmt: skip
    dalle = DALLE(config)
    codes = torch.randint(32, (8, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(param_groups(dalle), lr=3e-3)
    for _ in range(120):
        logits = dalle(batch.text_tokens, codes)
        losses = dalle_loss(logits.text, logits.image, batch.text_tokens, codes, image_weight=7.0)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["loss_image"] < 0.05
    assert (dalle(batch.text_tokens, codes).image.argmax(-1) == codes).all()
