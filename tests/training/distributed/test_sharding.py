"""A transformer sharded over two processes trains like an unsharded one, and its checkpoint can be consolidated."""

import json
import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import save
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lightning_dalle.checkpoints import dvae_metadata, load_dalle
from lightning_dalle.cli import main
from lightning_dalle.errors import UserError
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.dvae import DVAE, DVAEConfig
from lightning_dalle.models.transformer import Block, TransformerConfig
from lightning_dalle.training.callbacks.visualization import SampleGrid
from lightning_dalle.training.distributed.sharding import build_dalle
from lightning_dalle.training.lit_dalle import LitDALLE

SHAPE = DALLEConfig(
    transformer=TransformerConfig(n_layer=3, n_head=2, n_embd=16), text_len=2, text_vocab_size=300, grid=8,
    codebook_size=12,
)  # fmt: skip


class StepRecorder(pl.Callback):
    """Recorder of ids, loss and number of weights of each process, as JSON."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        held = [p.to_local() if isinstance(p, DTensor) else p for p in pl_module.dalle.parameters()]
        self.seen.append({"ids": batch.ids, "loss": float(outputs["loss"]), "held": sum(p.numel() for p in held)})
        name = f"{trainer.global_step - len(self.seen)}_{trainer.global_rank}.json"
        (self.folder / name).write_text(json.dumps(self.seen))


@pytest.fixture
def dvae_checkpoint(tmp_path: Path) -> Path:
    """Write a dVAE with an even codebook size, which two processes can shard."""
    dvae = DVAE(DVAEConfig(image_size=32, codebook_size=12, n_group=3, n_block=1, n_hid=8, n_init=8))
    return save(tmp_path / "dvae.ckpt", dvae_metadata(dvae), dvae=dvae)


def config(folder: Path, dvae: Path, **trainer: Any) -> Path:
    """Write a config whose captions all have the same length, so that the mean over processes is the batch mean."""
    template = yaml.safe_load((Path(__file__).parents[2] / "tiny" / "dalle.yaml").read_text())
    *_, keep = template["trainer"]["callbacks"]
    keep["init_args"] |= {"filename": "{step}", "save_last": "link", "every_n_train_steps": 2}
    template["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    template["trainer"] |= {
        "limit_val_batches": 0,
        "gradient_clip_val": 0.1,
        "callbacks": [{"class_path": "test_sharding.StepRecorder", "init_args": {"folder": str(folder)}}, keep],
        **trainer,
    }
    template["model"]["init_args"] = {
        "config": {"n_layer": 3, "n_head": 2, "n_embd": 16},
        "dvae_checkpoint": str(dvae),
        "learning_rate": {"start": 3.0e-3, "end": 3.0e-4, "num_steps": 6, "warmup_steps": 2},
        "checkpoint_activations": "strategy" in trainer,
    }
    template["data"] |= {"text_len": 2, "vocab_size": 300, "batch_size": 16 // trainer.get("devices", 1)}
    folder.mkdir()
    file = folder / "dalle.yaml"
    file.write_text(yaml.safe_dump(template))
    return file


def run_rank(rank: int, port: int, argv: list[str]) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    main(argv)


def in_two_processes(argv: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=run_rank, args=(rank, port, argv)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0


def seen(folder: Path, start: int, rank: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / f"{start}_{rank}.json").read_text())
    return found


def test_two_sharded_processes_learn_the_same_as_one_with_half_the_weights_each(
    dvae_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shard with clipped gradients, activation checkpointing and resuming; compare with one unbroken process."""
    alone = config(tmp_path / "alone", dvae_checkpoint, max_steps=6)
    main(["fit", "--config", str(alone)])
    strategy = {"class_path": "pytorch_lightning.strategies.ModelParallelStrategy"}
    shared = config(tmp_path / "shared", dvae_checkpoint, max_steps=6, devices=2, strategy=strategy)
    in_two_processes(["fit", "--config", str(shared), "--trainer.max_steps", "4"])
    parts = tmp_path / "shared" / "dalle" / "checkpoints" / "last.ckpt"
    assert parts.is_dir()
    in_two_processes(["fit", "--config", str(shared), "--ckpt_path", str(parts)])

    whole = seen(tmp_path / "alone", 0)
    both = [seen(tmp_path / "shared", 0, rank) + seen(tmp_path / "shared", 4, rank) for rank in range(2)]
    assert len(whole) == 6
    for one, first, second in zip(whole, *both, strict=True):
        assert (first["loss"] + second["loss"]) / 2 == pytest.approx(one["loss"], abs=1e-5)
        assert sorted(first["ids"] + second["ids"]) == sorted(one["ids"]), (
            "the processes must read disjoint halves of the batch"
        )
        assert first["held"] == second["held"] == one["held"] / 2
    assert whole[0]["loss"] - whole[-1]["loss"] > 0.1, "the loss must decrease"

    with pytest.raises(
        UserError, match=r"last.ckpt is a folder, so it is a sharded checkpoint; merge it into one file with"
    ):
        load_dalle(parts)
    file = tmp_path / "whole.ckpt"
    monkeypatch.setattr(sys, "argv", ["consolidate_checkpoint", str(parts), "--output_file", str(file)])
    runpy.run_module("lightning_fabric.utilities.consolidate_checkpoint", run_name="__main__")
    ours, theirs = load_dalle(file), load_dalle(tmp_path / "alone" / "dalle" / "checkpoints" / "last.ckpt")
    for name, weight in theirs.dalle.state_dict().items():
        torch.testing.assert_close(ours.dalle.state_dict()[name], weight, atol=1e-5, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(ours.dvae.parameters(), theirs.dvae.parameters(), strict=True))
    main(["generate", "--checkpoint", str(file), "--prompts", '["red apple"]', "--out", str(tmp_path / "drawn")])
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 4


def sharded_trainer(*callbacks: pl.Callback) -> pl.Trainer:
    strategy = ModelParallelStrategy()
    return pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, callbacks=[*callbacks], logger=False)


def test_callbacks_that_need_the_whole_model_are_rejected() -> None:
    with pytest.raises(
        UserError, match=r"EMAWeightAveraging needs the whole model in one process, .* remove EMAWeightAveraging"
    ):
        build_dalle(SHAPE, sharded_trainer(EMAWeightAveraging()), checkpoint_activations=False)
    samples = SampleGrid(["a cat"])
    trainer = sharded_trainer(samples)
    with pytest.raises(UserError, match=r"SampleGrid needs the whole model in one process, .* remove SampleGrid"):
        samples.setup(trainer, LitDALLE(), "fit")


def alone() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def test_initial_weights_depend_only_on_the_seed() -> None:
    torch.manual_seed(3)
    first = build_dalle(SHAPE, alone(), checkpoint_activations=False)
    torch.rand(5)
    second = build_dalle(SHAPE, alone(), checkpoint_activations=True)
    torch.manual_seed(4)
    other, plain = build_dalle(SHAPE, alone(), checkpoint_activations=False), DALLE(SHAPE)
    assert not list(first.buffers()), "to_empty() leaves buffers unset, because reset_parameters() sets none"
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
        if name.endswith(("norm_1.weight", "norm_2.weight", "norm.weight", "bias")):
            assert torch.equal(weight, plain.state_dict()[name])
        else:
            assert not torch.equal(weight, other.state_dict()[name])
            torch.testing.assert_close(weight.std(), plain.state_dict()[name].std(), rtol=0.5, atol=0)


def test_activation_checkpointing_gives_the_same_gradients_and_computes_every_block_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    computed = []
    forward = Block.forward

    def counted(self: Block, *arguments: Any) -> torch.Tensor:
        computed.append(self)
        return forward(self, *arguments)

    monkeypatch.setattr(Block, "forward", counted)
    gradients, times = [], []
    for checkpoint_activations in (False, True):
        computed.clear()
        dalle = build_dalle(SHAPE, alone(), checkpoint_activations)
        logits = dalle(torch.tensor([[5, 7]]), torch.arange(64)[None] % 12)
        (logits.text.sum() + logits.image.logsumexp(-1).sum()).backward()
        gradients.append([parameter.grad for parameter in dalle.parameters()])
        times.append(len(computed))
    assert times == [3, 6]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]
