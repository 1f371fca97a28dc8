"""Two processes of gloo: what they send, what they average, what they learn, and what a checkpoint keeps."""

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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import SGD, AdamW
from torch.testing import assert_close
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor

from lightning_dalle.cli import lightning
from lightning_dalle.data.sources.openmoji import OpenMoji
from lightning_dalle.errors import UserError
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.tokenizer import CaptionTokenizer
from lightning_dalle.training.distributed.powersgd import Factored, PowerSGDStrategy, in_shards, orthonormal
from lightning_dalle.training.optim.param_groups import NewOptimizer, configure

WIDTH, LAYERS, GRID, TEXT = 64, 2, 6, 12
BATCH = 16  # of all processes together


@pytest.fixture(scope="module")
def examples() -> tuple[Tensor, Tensor]:
    """Names of real emoji as bytes, and their pictures at 6 px with 4 levels a colour: 64 codes.

    Names that fill the text alone, so that the loss of a batch is the mean of its parts' losses.
    """
    records = OpenMoji().load(32)["train"]
    tokenizer = CaptionTokenizer.train(["a"], vocab_size=256, text_len=TEXT)
    names = [tokenizer.encode(captions[0]) for captions in records["captions"]]
    rows = [row for row, name in enumerate(names) if len(name) >= TEXT][:1024]
    pictures = [records[row]["image"].convert("RGB").resize((GRID, GRID)) for row in rows]
    red, green, blue = torch.stack([pil_to_tensor(picture).long() // 64 for picture in pictures]).flatten(2).unbind(1)
    return torch.tensor([names[row][:TEXT] for row in rows]), 16 * red + 4 * green + blue


class Learner(pl.LightningModule):
    """A small DALL-E on batches that are the same in pieces, by however many processes; records what a step did.

    Args:
        examples: caption tokens and codes.
        lr: at its highest; with 0 the gradients of all runs are those of the same weights.
        optimizer: by default one that is continuous in its gradients, which Adam is not where they are 0.
        scale: of the loss.
        spoiled: the step in which the second process has gradients that are not finite.
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
        self.examples, self.lr, self.optimizer = examples, lr, NewOptimizer(optimizer)
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
        return configure(self.dalle, self.optimizer, learning_rate)

    def setup(self, stage: str) -> None:
        all_reduce = dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.sent += tensor.numel() * tensor.element_size()
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted  # of this process, which ends with the fit

    def on_before_backward(self, loss: Tensor) -> None:
        self.sent = 0

    def on_after_backward(self) -> None:
        gradients = {name: parameter.grad.clone() for name, parameter in self.dalle.named_parameters()}
        self.steps.append({"sent": self.sent, "gradients": gradients})
        for parameter in self.parameters():
            parameter.grad.nan_to_num_(0, 0, 0)  # type: ignore[union-attr]  # as a scaler that skips


class Folder(pl.Callback):
    """Where every process leaves what it recorded, since it ends with the fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(list(pl_module.steps), self.folder / f"{trainer.global_rank}.pt")  # type: ignore[arg-type]


def fit(folder: Path, strategy: DDPStrategy, module: Learner, steps: int, devices: int = 2, **options: Any) -> Any:
    """What the first process recorded; `last.ckpt` of each step is in the folder."""
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


def is_inside(name: str) -> bool:
    return "blocks" in name and name.endswith(("qkv.weight", "project.weight", "expand.weight"))


@pytest.mark.parametrize(
    ("rank", "shards", "saved"), [(16, 8, 1 - 5 * 16 / (8 * WIDTH)), (12, 4, 1 - 3 * 12 / (4 * WIDTH))]
)
def test_the_bytes_that_are_sent_are_those_of_the_formula(
    tmp_path: Path, examples: tuple[Tensor, Tensor], rank: int, shards: int, saved: float
) -> None:
    """Of the blocks' matrices, the paper's 1 - 5 r / (8 d) with its 8 shards less; of the rest, all."""
    module = Learner(examples)
    sizes = {True: 0, False: 0}
    for name, parameter in module.dalle.named_parameters():
        sizes[is_inside(name)] += parameter.numel()
    assert sizes[True] == 12 * WIDTH**2 * LAYERS
    for step in fit(tmp_path, compressed(rank, shards), module, steps=2):
        assert step["sent"] == 4 * ((1 - saved) * sizes[True] + sizes[False])


def test_at_full_rank_it_is_the_average_and_what_is_not_compressed_is_to_the_bit(
    tmp_path: Path, examples: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches to a step, which are sent once; gradients scaled as the paper's are, beside which 1e-6 is little."""
    monkeypatch.setattr(Factored, "sent", 0)  # more than the gradients in truth, for which a fit would be refused
    scale = 2.0**13
    (tmp_path / "plain").mkdir()
    (tmp_path / "full").mkdir()
    module = partial(Learner, examples, scale=scale)
    expected = fit(tmp_path / "plain", plain(), module(), steps=2, accumulate_grad_batches=2)
    found = fit(tmp_path / "full", compressed(4 * WIDTH), module(), steps=2, accumulate_grad_batches=2)
    assert [step["sent"] > 0 for step in found] == [False, True] * 2
    for batch in (1, 3):
        for name, gradient in expected[batch]["gradients"].items():
            if is_inside(name):
                assert_close(found[batch]["gradients"][name] / scale, gradient / scale, atol=1e-5, rtol=0)
            else:
                assert torch.equal(found[batch]["gradients"][name], gradient), name


@pytest.mark.parametrize("spoiled", [-1, 1])
def test_what_is_not_sent_is_owed(tmp_path: Path, examples: tuple[Tensor, Tensor], spoiled: int) -> None:
    """All gradients of four steps are what was sent of them and the errors in the checkpoint.

    But for a step in which a process had some that were not finite: then no process gets any, and each owes as before.
    """
    (tmp_path / "plain").mkdir()
    expected = fit(tmp_path / "plain", plain(), Learner(examples), steps=4)
    found = fit(tmp_path, compressed(), Learner(examples, spoiled=spoiled), steps=4)
    finite = [step for step in range(4) if step != spoiled]
    errors = torch.load(tmp_path / "step=4.ckpt")["powersgd"]
    assert errors.keys() == {f"dalle.{name}" for name in expected[0]["gradients"] if is_inside(name)}
    for name, error in errors.items():
        of_plain, of_found = (
            [step["gradients"][name.removeprefix("dalle.")] for step in run] for run in (expected, found)
        )
        due, sent = (sum(gradients[step] for step in finite) for gradients in (of_plain, of_found))
        assert error.norm() > 0.1 * due.norm(), "at this rank not all can be sent"
        assert_close(sent + error, due, atol=1e-6, rtol=0)
        if spoiled >= 0:
            assert not of_found[spoiled].isfinite().any()


@pytest.mark.parametrize("devices", [2, 1])
def test_resumed_equals_unbroken_also_with_another_number_of_processes(
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
    """Records too what the optimizer gets."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(*args, **kwargs)
        gradients = {name: parameter.grad.clone() for name, parameter in self.dalle.named_parameters()}
        self.steps[-1]["clipped"] = gradients


def test_what_arrives_is_clipped(tmp_path: Path, examples: tuple[Tensor, Tensor]) -> None:
    """By the norm of all of it, once decompressed, in every process alike."""
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
                assert torch.linalg.matrix_rank(in_shards(gradient, 8), rtol=1e-4).tolist() == [2] * 8


def test_errors_go_by_the_same_names_with_activations_checkpointed(examples: tuple[Tensor, Tensor]) -> None:
    """So that a run can go on with or without, and draws the same Q."""
    plain, wrapped = Learner(examples), Learner(examples)
    blocks = wrapped.dalle.transformer.blocks
    for i, block in enumerate(blocks):
        blocks[i] = checkpoint_wrapper(block)
    expected, found = (compressed()._factored(module) for module in (plain, wrapped))
    assert found.keys() == expected.keys() <= wrapped.state_dict().keys()
    for name, matrix in expected.items():
        assert torch.equal(found[name].q, matrix.q)


@pytest.mark.parametrize("p", [torch.zeros(2, 16, 4), torch.randn(2, 16, 1).expand(2, 16, 4), torch.randn(2, 16, 4)])
def test_any_matrix_gives_an_orthonormal_basis(p: Tensor) -> None:
    """Also none at all, or one of lower rank than columns, which Gram-Schmidt divides by zero on."""
    basis = orthonormal(p)
    assert_close(basis.mT @ basis, torch.eye(4).expand(2, 4, 4))
    assert_close(basis @ (basis.mT @ p), p, atol=1e-5, rtol=0)


def test_mistakes_are_said(examples: tuple[Tensor, Tensor]) -> None:
    for rank, shards in ((100, 8), (0, 8), (-8, 8), (-8, -8), (8, 0)):
        wanted = rf"rank of PowerSGD \({rank}\) must be a multiple of its shards \({shards}\), and both at least 1"
        with pytest.raises(UserError, match=wanted):
            PowerSGDStrategy(rank, shards)
    with pytest.raises(
        UserError, match=r"blocks.0.attention.qkv.weight is of 192 x 64 and cannot be cut into 15 shards"
    ):
        compressed(rank=10, shards=5)._factored(Learner(examples))
    with pytest.raises(UserError, match="this model has none"):
        compressed()._factored(nn.Linear(4, 4))
    # A column of all shards is (1/2 + 1/2) / 64 of the gradients: at 64 columns it is they.
    with pytest.raises(UserError, match=r"rank 64 in 2 shards would send 98,304 numbers instead of the 98,304 grad"):
        compressed(rank=64, shards=2)._factored(Learner(examples))
    compressed(rank=62, shards=2)._factored(Learner(examples))


def test_the_config_takes_the_place_of_a_fits_own_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    on = ["--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    cli = lightning(["fit", "--config", "configs/coco/dalle.yaml", "--config", "configs/paper/powersgd.yaml", *on])
    assert isinstance(cli.trainer.strategy, PowerSGDStrategy)
    assert (cli.trainer.strategy.rank, cli.trainer.strategy.shards) == (896, 8)


@pytest.mark.slow
def test_it_learns_what_it_learns_uncompressed(tmp_path: Path, examples: tuple[Tensor, Tensor]) -> None:
    """300 steps with 75 % less to send of the blocks; more shards need a higher rank (docs/powersgd.md)."""
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
