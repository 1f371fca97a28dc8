"""Gradient scales per resblock: the paper's update rule, underflow, and training in 16 bits."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_dalle.cli import main
from lightning_dalle.data.sources.openmoji import OpenMoji
from lightning_dalle.errors import UserError
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.tokenizer import CaptionTokenizer
from lightning_dalle.training.optim.adamw16 import PaperAdamW
from lightning_dalle.training.optim.param_groups import param_groups
from lightning_dalle.training.precision.gradient_scales import GradientScales, PaperPrecision


def after(updates: int, scales: GradientScales, is_finite: bool) -> float:
    """Return the first scale after a number of updates, all finite or all not."""
    for _ in range(updates):
        scales.update(torch.tensor([is_finite]), not is_finite)
    return scales[0]


def test_a_scale_starts_at_2_to_the_13_and_doubles_in_1000_finite_updates() -> None:
    scales = GradientScales(1)
    assert scales[0] == 2**13
    assert after(1, scales, is_finite=True) == pytest.approx(2**13 * 2 ** (1 / 1000), rel=1e-12)
    assert after(999, scales, is_finite=True) == pytest.approx(2**14, rel=1e-12)


def test_a_scale_backs_off_by_the_root_of_2_at_most_once_in_125_updates() -> None:
    scales = GradientScales(1)
    assert after(1, scales, is_finite=False) == pytest.approx(2**13 / math.sqrt(2), rel=1e-12)
    assert after(124, scales, is_finite=False) == pytest.approx(2**13 / math.sqrt(2), rel=1e-12)
    assert after(1, scales, is_finite=False) == pytest.approx(2**12, rel=1e-12)
    assert (scales.num_updates, scales.num_skipped) == (126, 126)


def test_a_scale_stays_between_2_to_the_7_and_2_to_the_24() -> None:
    scales = GradientScales(1)
    scales.log2[0] = 23.9995
    assert after(2, scales, is_finite=True) == 2**24
    scales.log2[0] = 7.3
    assert after(250, scales, is_finite=False) == 2**7


def test_each_scale_follows_its_own_resblock() -> None:
    scales = GradientScales(3)
    scales.update(torch.tensor([True, False, True]), True)
    assert scales.log2.tolist() == pytest.approx([13.001, 12.5, 13.001])


def dalle(n_layer: int = 2) -> DALLE:
    torch.manual_seed(0)
    transformer = TransformerConfig(n_layer=n_layer, n_head=2, n_embd=32, conv_kernel=3)
    return DALLE(DALLEConfig(transformer=transformer, text_len=8, text_vocab_size=512, grid=6, codebook_size=64))


def to_fp16(model: nn.Module) -> PaperPrecision:
    precision = PaperPrecision()
    precision.connect(model, [], [])
    return precision


class Steep(nn.Module):
    """Resblocks whose gradients grow by 2^7 from each block to the block before it.

    The identity path is multiplied between blocks. Pre-LN branches normalize their input, so only the identity path,
    which is in fp32, has large values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks = dalle(n_layer=6).transformer.blocks
        for parameter in self.blocks.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.2)
        self.slope = torch.randn(44, 32)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * 2**7
        return (x * self.slope).sum() * 2.0**-42


def errors(model: Steep, x: Tensor, log2: list[float]) -> list[float]:
    """Return each resblock's relative gradient error against fp64: 1 where it is lost, NaN on overflow."""
    exact, model = deepcopy(model).double(), deepcopy(model)
    exact(x.double()).backward()
    precision = to_fp16(model)
    precision.scales.log2 = torch.tensor(log2, dtype=torch.float64)
    model(x).backward()
    true = [branch for block in exact.blocks for branch in (block.attention, block.mlp)]
    found = []
    for i, branches in enumerate(zip(precision.branches, true, strict=True)):
        ours, reference = (torch.cat([p.grad.flatten() for p in branch.parameters()]) for branch in branches)  # type: ignore[union-attr]
        found.append(float((ours.double() / precision.scales[i] - reference).norm() / reference.norm()))
    return found


def test_scales_per_resblock_keep_gradients_that_a_single_scale_loses() -> None:
    """Set each scale as large as its gradients allow, which is the limit of the update rule."""
    model, x = Steep(), torch.randn(2, 44, 32)
    trials = {log2: errors(model, x, [log2] * 12) for log2 in range(25)}
    largest = [max(log2 for log2, found in trials.items() if math.isfinite(found[i])) for i in range(12)]
    plain, single, own = trials[0], trials[min(largest)], errors(model, x, largest)
    assert all(7 <= log2 <= 24 for log2 in largest)
    assert plain[-4:] == pytest.approx([1.0] * 4, abs=0.01), "four resblocks lose their whole gradients"
    assert max(single) > 0.3, "some gradients are lost"
    assert max(own) < 0.002


def test_an_overflow_does_not_spread_to_other_resblocks() -> None:
    model = dalle()
    precision = to_fp16(model)
    precision.scales.log2[3] = 60
    text_tokens, codes = torch.randint(512, (2, 8)), torch.randint(64, (2, 36))
    logits = model(text_tokens, codes)
    (logits.text.mean() + logits.image.mean()).backward()
    overflowed = {id(p) for p in precision.branches[3].parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() == (id(parameter) not in overflowed), name


def test_resblocks_compute_in_16_bits_and_everything_else_in_32() -> None:
    model = dalle()
    precision = to_fp16(model)
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, _, y, name=name: seen.update({name: y.dtype}) if isinstance(y, Tensor) else None
        )
    logits = model(torch.randint(512, (2, 8)), torch.randint(64, (2, 36)))
    assert {logits.text.dtype, logits.image.dtype} == {torch.float32}
    linears = {name for name in seen if name.endswith(("qkv", "project", "expand"))}
    assert {seen[name] for name in linears} == {torch.float16}
    assert {dtype for name, dtype in seen.items() if name not in linears} == {torch.float32}
    logits.image.sum().backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters() if p.grad is not None}
    precision.teardown()
    assert model(torch.randint(512, (1, 8)), torch.randint(64, (1, 36))).image.dtype == torch.float32
    assert seen["transformer.blocks.0.mlp.expand"] == torch.float32


def test_gradients_are_the_same_when_activations_are_recomputed() -> None:
    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        blocks = dalle().transformer.blocks
        to_fp16(blocks)
        torch.manual_seed(1)
        x = torch.randn(2, 44, 32, requires_grad=True)
        y = x
        for block in blocks:
            y = run(block, y)
        y.square().sum().backward()
        return [p.grad for p in (x, *blocks.parameters()) if p.grad is not None]

    kept = gradients(lambda block, x: block(x))
    recomputed = gradients(lambda block, x: checkpoint(block, x, use_reentrant=False))  # type: ignore[return-value]
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_a_model_without_resblocks_is_rejected() -> None:
    with pytest.raises(UserError, match=r"this model has none; use another --trainer\.precision"):
        to_fp16(nn.Linear(2, 2))


class Lit(pl.LightningModule):
    def __init__(self, optimizer_factory: Any) -> None:
        super().__init__()
        self.dalle, self.optimizer_factory = dalle(), optimizer_factory
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        text_tokens, codes = batch
        logits = self.dalle(text_tokens, codes)
        loss = dalle_loss(logits.text, logits.image, text_tokens, codes, image_weight=7.0)["loss"]
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer_factory(param_groups(self.dalle), lr=1e-3, betas=(0.9, 0.96))
        return optimizer


def fit(lit: Lit, data: TensorDataset, steps: int, plugins: Any = None, callbacks: Any = None) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, gradient_clip_val=4.0, plugins=plugins, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(lit, DataLoader(data, batch_size=8))
    return trainer


def test_an_update_with_a_nan_or_infinite_gradient_is_skipped() -> None:
    class Overflow(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.precision_plugin.scales.log2[0] = 60  # type: ignore[union-attr]

    lit, precision = Lit(PaperAdamW), PaperPrecision()
    before = deepcopy(lit.dalle.state_dict())
    data = TensorDataset(torch.randint(512, (8, 8)), torch.randint(64, (8, 36)))
    trainer = fit(lit, data, 1, [precision], [Overflow()])
    assert all(torch.equal(value, before[name]) for name, value in lit.dalle.state_dict().items())
    assert not trainer.optimizers[0].state
    assert precision.scales.log2.tolist() == pytest.approx([24, 13.001, 13.001, 13.001])
    assert (precision.scales.num_updates, precision.scales.num_skipped) == (1, 1)


def emoji() -> TensorDataset:
    """Return real captions, and real images as 6 x 6 codes for 64 colors."""
    rows = OpenMoji().load(32)["train"].select(range(2400))
    captions = [row[0] for row in rows["captions"]]
    tokenizer = CaptionTokenizer.train(captions, vocab_size=512, text_len=8)
    pixels = torch.stack([
        torch.frombuffer(bytearray(image.resize((6, 6)).convert("RGB").tobytes()), dtype=torch.uint8)
        for image in rows["image"]
    ]).view(-1, 36, 3)  # fmt: skip
    codes = ((pixels // 64).long() * torch.tensor([16, 4, 1])).sum(2)
    return TensorDataset(torch.tensor([tokenizer.pad(tokenizer.encode(caption))[0] for caption in captions]), codes)


def test_loss_of_300_steps_in_16_bits_is_within_2_percent_of_32_bits() -> None:
    data = emoji()
    fp32, fp16, precision = Lit(torch.optim.AdamW), Lit(PaperAdamW), PaperPrecision()
    fit(fp32, data, 300)
    fit(fp16, data, 300, [precision])
    first, last_fp32, last_fp16 = (
        torch.tensor(losses).mean() for losses in (fp32.losses[:5], fp32.losses[-50:], fp16.losses[-50:])
    )
    assert last_fp32 < 0.7 * first
    assert_close(last_fp16, last_fp32, rtol=0.02, atol=0)
    assert precision.scales.log2.tolist() == pytest.approx([13.3] * 4), "no gradient overflows here"


def test_fp16_config_logs_its_scales_and_resumes_to_the_bit(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    first = ["fit", "--config", str(tiny_run["dalle"]), "--config", "configs/paper/fp16_per_block_scale.yaml"]
    first += ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    last = tmp_path / "dalle" / "checkpoints" / "last.ckpt"
    main(first)
    unbroken = torch.load(last, weights_only=True)
    events = EventAccumulator(str(tmp_path / "dalle")).Reload()  # type: ignore[no-untyped-call]
    assert "gradient_scales" in events.Tags()["images"]
    assert "train/skipped_updates" in events.Tags()["scalars"]
    last.unlink()
    main([*first, "--trainer.max_steps", "7"])
    main([*first, "--ckpt_path", str(last)])
    resumed = torch.load(last, weights_only=True)
    assert unbroken["PaperPrecision"]["log2"].tolist() == pytest.approx([13.012] * 6)
    assert unbroken["PaperPrecision"]["num_updates"] == 12
    for key in ("PaperPrecision", "state_dict", "optimizer_states"):
        assert_close(resumed[key], unbroken[key], rtol=0, atol=0)
