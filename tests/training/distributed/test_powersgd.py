"""PowerSGD on two gloo processes: bytes sent, averages, training, and checkpoints."""

from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningCLI, OptimizerCallable
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.testing import assert_close
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from lightning_dalle.data.sources.openmoji import OpenMoji
from lightning_dalle.errors import UserError
from lightning_dalle.lightning_cli import run_lightning
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.tokenizer import CaptionTokenizer
from lightning_dalle.training.distributed.powersgd import PowerSGDState, PowerSGDStrategy, orthonormalize, split_shards
from lightning_dalle.training.optim.param_groups import OptimizerFactory, configure_optimizer

WIDTH, LAYERS, GRID, TEXT = 64, 2, 6, 12
BATCH = 16  # total of all processes


@pytest.fixture(scope="module")
def examples() -> tuple[Tensor, Tensor]:
    """Return names of real emoji as bytes, and their images of 6 x 6 pixels as codes for 64 colors.

    All names fill the text, so that the loss of a batch is the mean of its parts' losses.
    """
    records = OpenMoji().load(32)["train"]
    tokenizer = CaptionTokenizer.train(["a"], vocab_size=256, text_len=TEXT)
    names = [tokenizer.encode(captions[0]) for captions in records["captions"]]
    rows = [row for row, name in enumerate(names) if len(name) >= TEXT][:1024]
    images = [records[row]["image"].convert("RGB").resize((GRID, GRID)) for row in rows]
    red, green, blue = torch.stack([pil_to_tensor(image).long() // 64 for image in images]).flatten(2).unbind(1)
    return torch.tensor([names[row][:TEXT] for row in rows]), 16 * red + 4 * green + blue


class Learner(pl.LightningModule):
    """Small DALL-E on global batches that do not depend on the number of processes; records each step.

    Args:
        examples: caption tokens and codes.
        lr: maximum learning rate; with 0, all runs compute gradients at the same weights.
        optimizer: optimizer; the default is continuous in the gradients, unlike Adam at 0.
        scale: factor of the loss.
        spoiled: step in which the second process has infinite gradients.
    """

    def __init__(
        self,
        examples: tuple[Tensor, Tensor],
        lr: float = 0.0,
        optimizer: OptimizerCallable = partial(SGD, momentum=0.9),  # noqa: B008
        scale: float = 1.0,
        spoiled: int = -1,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        transformer = TransformerConfig(n_layer=LAYERS, n_head=2, n_embd=WIDTH, conv_kernel=3)
        self.dalle = DALLE(
            DALLEConfig(transformer=transformer, text_len=TEXT, text_vocab_size=256, grid=GRID, codebook_size=64)
        )
        self.examples, self.lr, self.optimizer = examples, lr, OptimizerFactory(optimizer)
        self.scale, self.spoiled = scale, spoiled
        self.steps: deque[dict[str, Any]] = deque(maxlen=4)
        self.sent = 0

    def loss(self, rows: slice) -> Tensor:
        text, codes = (example[rows] for example in self.examples)
        logits = self.dalle(text, codes)
        return dalle_loss(logits.text, logits.image, text, codes, image_weight=7.0)["loss"]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        each = BATCH // self.trainer.world_size
        index = self.trainer.fit_loop.total_batch_idx
        start = (index * BATCH + self.global_rank * each) % len(self.examples[0])
        is_spoiled = self.global_rank == 1 and index == self.spoiled
        return self.loss(slice(start, start + each)) * (torch.inf if is_spoiled else self.scale)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        learning_rate = CosineAnneal(start=self.lr, end=0.0, num_steps=300, warmup_steps=30)
        return configure_optimizer(self.dalle, self.optimizer, learning_rate)

    def setup(self, stage: str) -> None:
        all_reduce = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent += tensor.numel() * tensor.element_size()
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted  # not restored, because this process ends with the fit

    def on_before_backward(self, loss: Tensor) -> None:
        self.sent = 0

    def on_after_backward(self) -> None:
        gradients = {name: parameter.grad.clone() for name, parameter in self.dalle.named_parameters()}
        self.steps.append({"sent": self.sent, "gradients": gradients})
        for parameter in self.parameters():
            parameter.grad.nan_to_num_(0, 0, 0)  # type: ignore[union-attr]  # like a gradient scaler that skips the step


class Folder(pl.Callback):
    """Writer of the recorded steps of every process, because the processes end with the fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(list(pl_module.steps), self.folder / f"{trainer.global_rank}.pt")  # type: ignore[arg-type]


def fit(folder: Path, strategy: DDPStrategy, module: Learner, steps: int, devices: int = 2, **options: Any) -> Any:
    """Fit and return the recorded steps of the first process; the folder contains the checkpoints."""
    start = options.pop("ckpt_path", None)
    save = ModelCheckpoint(folder, "{step}", every_n_train_steps=options.pop("save_every", steps), save_top_k=-1)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=devices, strategy=strategy, callbacks=[save, Folder(folder)],
        logger=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(range(1000), batch_size=1), ckpt_path=start)  # type: ignore[arg-type]
    return torch.load(folder / "0.pt")


def plain() -> DDPStrategy:
    return DDPStrategy(start_method="fork")


def compressed(rank: int = 16, shards: int = 8) -> PowerSGDStrategy:
    return PowerSGDStrategy(rank, shards, start_method="fork")


def is_block_matrix(name: str) -> bool:
    return "blocks" in name and name.endswith(("qkv.weight", "project.weight", "expand.weight"))


@pytest.mark.parametrize(
    ("rank", "shards", "saved"), [(16, 8, 1 - 5 * 16 / (8 * WIDTH)), (12, 4, 1 - 3 * 12 / (4 * WIDTH))]
)
def test_the_number_of_bytes_sent_matches_the_formula(
    tmp_path: Path, examples: tuple[Tensor, Tensor], rank: int, shards: int, saved: float
) -> None:
    """Check the paper's saving of 1 - 5 r / (8 d) for block matrices with 8 shards, and none for the rest."""
    module = Learner(examples)
    sizes = {True: 0, False: 0}
    for name, parameter in module.dalle.named_parameters():
        sizes[is_block_matrix(name)] += parameter.numel()
    assert sizes[True] == 12 * WIDTH**2 * LAYERS
    for step in fit(tmp_path, compressed(rank, shards), module, steps=2):
        assert step["sent"] == 4 * ((1 - saved) * sizes[True] + sizes[False])


def test_full_rank_equals_the_average_and_uncompressed_gradients_are_exact(
    tmp_path: Path, examples: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulate two batches per exchange, and scale gradients like the paper, which makes EPSILON negligible."""
    monkeypatch.setattr(PowerSGDState, "numel_sent", 0)  # the true number exceeds the gradients, which is rejected
    scale = 2.0**13
    (tmp_path / "plain").mkdir()
    (tmp_path / "full").mkdir()
    module = partial(Learner, examples, scale=scale)
    expected = fit(tmp_path / "plain", plain(), module(), steps=2, accumulate_grad_batches=2)
    found = fit(tmp_path / "full", compressed(4 * WIDTH), module(), steps=2, accumulate_grad_batches=2)
    assert [step["sent"] > 0 for step in found] == [False, True] * 2
    for batch in (1, 3):
        for name, gradient in expected[batch]["gradients"].items():
            if is_block_matrix(name):
                assert_close(found[batch]["gradients"][name] / scale, gradient / scale, atol=1e-5, rtol=0)
            else:
                assert torch.equal(found[batch]["gradients"][name], gradient), name


@pytest.mark.parametrize("spoiled", [-1, 1])
def test_unsent_gradients_remain_in_the_error(tmp_path: Path, examples: tuple[Tensor, Tensor], spoiled: int) -> None:
    """The gradients of four steps equal what was sent plus the errors in the checkpoint.

    After a step with infinite gradients on one process, all processes have such gradients and their previous errors.
    """
    (tmp_path / "plain").mkdir()
    expected = fit(tmp_path / "plain", plain(), Learner(examples), steps=4)
    found = fit(tmp_path, compressed(), Learner(examples, spoiled=spoiled), steps=4)
    finite = [step for step in range(4) if step != spoiled]
    errors = torch.load(tmp_path / "step=4.ckpt")["powersgd"]
    assert errors.keys() == {f"dalle.{name}" for name in expected[0]["gradients"] if is_block_matrix(name)}
    for name, error in errors.items():
        of_plain, of_found = (
            [step["gradients"][name.removeprefix("dalle.")] for step in run] for run in (expected, found)
        )
        due, sent = (sum(gradients[step] for step in finite) for gradients in (of_plain, of_found))
        assert error.norm() > 0.1 * due.norm(), "this rank cannot send all of the gradient"
        assert_close(sent + error, due, atol=1e-6, rtol=0)
        if spoiled >= 0:
            assert not of_found[spoiled].isfinite().any()


@pytest.mark.parametrize("devices", [2, 1])
def test_a_resumed_run_equals_an_unbroken_one_with_any_number_of_processes(
    tmp_path: Path, examples: tuple[Tensor, Tensor], devices: int
) -> None:
    def weights(**options: Any) -> dict[str, Tensor]:
        module = Learner(examples, lr=0.05)
        fit(tmp_path, compressed(), module, steps=10, **options)
        return module.state_dict()

    unbroken = weights(save_every=5)
    checkpoint = torch.load(tmp_path / "step=5.ckpt")
    torch.save({**checkpoint, "powersgd": {}}, tmp_path / "forgetful.ckpt")
    resumed = weights(devices=devices, ckpt_path=tmp_path / "step=5.ckpt")
    forgetful = weights(devices=devices, ckpt_path=tmp_path / "forgetful.ckpt")
    for name, value in unbroken.items():
        assert_close(resumed[name], value, atol=1e-6, rtol=0)
    assert max(float((forgetful[name] - value).abs().max()) for name, value in unbroken.items()) > 1e-3


class Clipped(Learner):
    """Learner that also records the clipped gradients."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)
        gradients = {name: parameter.grad.clone() for name, parameter in self.dalle.named_parameters()}
        self.steps[-1]["clipped"] = gradients


def test_decompressed_gradients_are_clipped(tmp_path: Path, examples: tuple[Tensor, Tensor]) -> None:
    """Clip by the norm of all decompressed gradients, equally on every process."""
    found = fit(tmp_path, compressed(), Clipped(examples, scale=2.0**7), steps=2, gradient_clip_val=4.0)
    other = torch.load(tmp_path / "1.pt")
    for step, step_there in zip(found, other, strict=True):
        arrived, clipped = step["gradients"], step["clipped"]
        norm = torch.cat([gradient.flatten() for gradient in arrived.values()]).norm()
        assert norm > 2 * 4.0
        for name, gradient in arrived.items():
            assert_close(clipped[name], gradient * 4.0 / norm)
            assert torch.equal(step_there["clipped"][name], clipped[name])
            if name.endswith("attention.project.weight"):  # 8 shards, of rank 2 each once decompressed
                assert torch.linalg.matrix_rank(split_shards(gradient, 8), rtol=1e-4).tolist() == [2] * 8


@pytest.mark.parametrize("p", [torch.zeros(2, 16, 4), torch.randn(2, 16, 1).expand(2, 16, 4), torch.randn(2, 16, 4)])
def test_orthonormalize_handles_zero_and_low_rank_matrices(p: Tensor) -> None:
    """Orthonormalize matrices on which Gram-Schmidt would divide by zero."""
    basis = orthonormalize(p)
    assert_close(basis.mT @ basis, torch.eye(4).expand(2, 4, 4))
    assert_close(basis @ (basis.mT @ p), p, atol=1e-5, rtol=0)


def test_invalid_ranks_shards_and_models_are_rejected(examples: tuple[Tensor, Tensor]) -> None:
    for rank, shards in ((100, 8), (0, 8), (-8, 8), (-8, -8), (8, 0)):
        wanted = rf"rank={rank}, shards={shards}; set shards to at least 1 and rank to a positive"
        with pytest.raises(UserError, match=wanted):
            PowerSGDStrategy(rank, shards)
    with pytest.raises(
        UserError,
        match=r"the larger side of .*0.attention.qkv.weight \(192 x 64\) into 15 equal shards; change `shards` of",
    ):
        compressed(rank=10, shards=5)._new_states(Learner(examples))
    with pytest.raises(UserError, match=r"this model has none; use --trainer\.strategy ddp"):
        compressed()._new_states(nn.Linear(4, 4))
    # A column of all shards has (1/2 + 1/2) / 64 of the gradients' size, so 64 columns have all of it.
    with pytest.raises(
        UserError,
        match=r"rank 64 in 2 shards would send 98,304 values instead of 98,304 gradients; use a lower rank, or --tr",
    ):
        compressed(rank=64, shards=2)._new_states(Learner(examples))
    compressed(rank=62, shards=2)._new_states(Learner(examples))


def test_the_powersgd_config_replaces_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    on = ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    cli = run_lightning(["fit", "--config", "configs/coco/dalle.yaml", "--config", "configs/paper/powersgd.yaml", *on])
    assert isinstance(cli.trainer.strategy, PowerSGDStrategy)
    assert (cli.trainer.strategy.rank, cli.trainer.strategy.shards) == (896, 8)


@pytest.mark.slow
def test_compressed_training_learns_as_much_as_uncompressed(tmp_path: Path, examples: tuple[Tensor, Tensor]) -> None:
    """Train 300 steps with 75 % less traffic for the blocks; more shards need a higher rank (docs/powersgd.md)."""
    losses = {}
    for strategy in (plain(), compressed(rank=16, shards=2)):
        module = Learner(examples, lr=1e-3, optimizer=partial(AdamW, betas=(0.9, 0.96)))
        fit(tmp_path, strategy, module, steps=300)
        with torch.no_grad():
            losses[type(strategy)] = float(module.loss(slice(None)))
    with torch.no_grad():
        untrained = float(Learner(examples).loss(slice(None)))
    assert losses[DDPStrategy] < 0.5 * untrained
    assert losses[PowerSGDStrategy] == pytest.approx(losses[DDPStrategy], rel=0.03)
