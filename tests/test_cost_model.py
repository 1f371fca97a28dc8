"""A plan against the paper's own figures, and against small runs that were measured."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_dalle.cli import main
from lightning_dalle.cost_model import (
    PRECISIONS,
    THE_PAPER_S,
    Training,
    memory,
    operations,
    parameters,
    saved_by_powersgd,
    sent,
)
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.training.distributed.powersgd import PowerSGDStrategy
from lightning_dalle.training.optim.adamw16 import PaperAdamW
from lightning_dalle.training.optim.muon import MuonAdamW
from lightning_dalle.training.optim.param_groups import decay_groups

PAPER = DALLEConfig(
    transformer=TransformerConfig(), text_len=256, text_vocab_size=16384, grid=32, codebook_size=8192
)  # fmt: skip
AS_THE_PAPER = Training(
    devices=1024, sharded_over=8, batch_size=1, accumulated=1, bytes=THE_PAPER_S, moments=4.0,
    checkpoints_activations=True, rank=896, shards=8,
)  # fmt: skip
SMALL = DALLEConfig(
    transformer=TransformerConfig(n_layer=4, n_head=4, n_embd=256), text_len=8, text_vocab_size=300, grid=4,
    codebook_size=64,
)  # fmt: skip
ALONE = Training(
    devices=1, sharded_over=1, batch_size=2, accumulated=1, bytes=PRECISIONS["32-true"], moments=8.0,
    checkpoints_activations=False, rank=None, shards=8,
)  # fmt: skip


def test_the_paper_s_weights() -> None:
    assert parameters(PAPER)["blocks"] == 12 * 3968**2 * 64
    assert round(2 * parameters(PAPER)["blocks"] / 1e9) == 24  # "the parameters take 24 GB in 16 bits"


@pytest.mark.parametrize(("width", "rank", "percent"), [(1920, 512, 83), (2688, 640, 85), (3968, 896, 86)])
def test_the_paper_s_compression(width: int, rank: int, percent: int) -> None:
    config = replace(PAPER, transformer=TransformerConfig(n_embd=width, n_head=width // 64))
    saved = saved_by_powersgd(config, replace(AS_THE_PAPER, rank=rank))
    assert saved == pytest.approx(1 - 5 * rank / (8 * width))
    assert round(100 * saved) == percent


@pytest.mark.parametrize("rank", [16, 64, 128, 256, 512])
def test_powersgd_sends_no_wider_factors_than_it_does(rank: int) -> None:
    matrices = PowerSGDStrategy(rank=rank)._factored(DALLE(SMALL)).values()
    sends = sum(matrix.sent for matrix in matrices) / sum(matrix.error.numel() for matrix in matrices)
    assert saved_by_powersgd(SMALL, replace(ALONE, rank=rank)) == pytest.approx(1 - sends)


def test_the_paper_s_training_fits_into_its_gpus() -> None:
    assert sum(memory(PAPER, AS_THE_PAPER).values()) < 16 * 2**30
    whole = sum(memory(PAPER, replace(AS_THE_PAPER, sharded_over=1)).values())
    assert whole > 16 * 2**30


def test_what_powersgd_saves_is_not_sent() -> None:
    plain = sent(PAPER, replace(AS_THE_PAPER, rank=None))["between replicas, by PowerSGD"]
    assert plain == sent(PAPER, AS_THE_PAPER)["between replicas, gradients as they are"]
    assert sent(PAPER, AS_THE_PAPER)["between replicas, by PowerSGD"] == pytest.approx(0.155 * plain, rel=0.02)
    assert all(size == 0 for size in sent(PAPER, ALONE).values())


def step(model: DALLE) -> torch.Tensor:
    text, codes = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)
    logits = model(text, codes)
    return dalle_loss(logits.text, logits.image, text, codes, 7.0)["loss"]


@pytest.mark.parametrize(
    ("optimizer", "moments"), [(torch.optim.AdamW, 8.0), (PaperAdamW, 4.0), (MuonAdamW, 4.0)]
)  # fmt: skip
def test_weights_gradients_and_moments_are_those_of_a_step(
    optimizer: type[torch.optim.Optimizer], moments: float
) -> None:
    model = DALLE(SMALL)
    new = optimizer(decay_groups(model))  # type: ignore[call-arg]
    step(model).backward()
    new.step()
    planned = memory(SMALL, replace(ALONE, moments=moments))
    assert planned["weights"] == sum(p.nbytes for p in model.parameters())
    assert planned["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    kept = [value for state in new.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert planned["the optimizer's moments"] == sum(moment.nbytes for moment in kept if moment.ndim)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activations_and_copies_are_those_that_autograd_keeps(precision: str) -> None:
    model = DALLE(SMALL)
    kept = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    is_mixed = precision == "bf16-mixed"
    autocast = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if is_mixed else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        step(model)
    planned = memory(SMALL, replace(ALONE, bytes=PRECISIONS[precision]))
    both = planned["activations"] + planned["weights in the precision of the products"]
    assert both == pytest.approx(sum(kept.values()), rel=0.08)


def test_what_is_split_is_gathered_in_the_weights_precision() -> None:
    how = replace(ALONE, devices=4, sharded_over=2, checkpoints_activations=True, bytes=PRECISIONS["bf16-mixed"])
    numbers, block = sum(parameters(SMALL).values()), parameters(SMALL)["blocks"] / 4
    planned = memory(SMALL, how)
    assert planned["two whole blocks, gathered"] == 2 * block * 4
    assert planned["weights in the precision of the products"] == block * 2  # of the one at hand
    assert sent(SMALL, how)["inside a replica"] == numbers / 2 * (2 * 4 + 4)


@pytest.mark.parametrize(("sharded_over", "times"), [(1, 1), (2, 3)])  # DDP waits for the last batch, FSDP2 does not
def test_a_step_is_of_all_accumulated_batches(sharded_over: int, times: int) -> None:
    once = replace(ALONE, devices=4, sharded_over=sharded_over)
    thrice = replace(once, accumulated=3)
    assert operations(SMALL, thrice) == 3 * operations(SMALL, once)
    assert sent(SMALL, thrice) == pytest.approx({name: times * size for name, size in sent(SMALL, once).items()})


def test_operations_are_those_that_torch_counts() -> None:
    model = DALLE(SMALL)
    with FlopCounterMode(display=False) as counter:
        step(model).backward()
    assert operations(SMALL, ALONE) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_command_reads_a_fit_s_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", "configs/openmoji/quickstart_dalle.yaml"]
    main(["plan", *config, "--memory", "8GiB", "--codebook_size", "512", "--grid", "8"])
    assert "3.1 M" in capsys.readouterr().out
    main(["plan", *config, "--memory", "1MiB"])
    assert "it does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--config configs/openmoji/quickstart_dvae.yaml", "a plan is of a transformer"),
        ("--config configs/paper/dalle_12b.yaml --devices 6 --sharded_over 4", "does not divide 6"),
        ("--config nowhere.yaml", "cannot be read"),
        ("--config configs/paper/dalle_1b.yaml --sharded_over 8", "holds all parameters on each device"),
        (
            "--config=[configs/paper/dalle_12b.yaml,configs/paper/powersgd.yaml] --sharded_over 8",
            "PowerSGDStrategy, holds all parameters on each device",
        ),
        ("--config=[configs/paper/dalle_12b.yaml,configs/paper/sixteen_bit.yaml]", "PaperAdamW of"),
        ("--config configs/coco/dalle.yaml --memory 16", "memory is '16'"),
        ("--config configs/coco/dalle.yaml --memory 1.2.3GiB", "memory is '1.2.3GiB'"),
        ("--config configs/coco/dalle.yaml --memory 0GiB", "memory is '0GiB'"),
        ("--config configs/coco/dalle.yaml --flops 0", "flops are 0.0"),
        ("--config configs/coco/dalle.yaml --devices 0", "devices is 0"),
        ("--config configs/coco/dalle.yaml --sharded_over 0", "sharded_over is 0"),
        ("--config configs/coco/dalle.yaml --grid 0", "grid is 0"),
        ("--config configs/coco/dalle.yaml --codebook_size -3", "codebook_size is -3"),
    ],
)
def test_mistakes_are_sentences(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *options.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (b"\xff\xfe\x00", "cannot be read"),
        (b"model:", "model in"),
        (b"data: other.yaml", "data in"),
        (b"model: {init_args: {config: {n_head: 0}}}", "n_head in"),
        (b"model: {init_args: {config: {heads: 1}}}", "the transformer of"),
        (b"trainer: {devices: -1}", "give --devices"),
        (b"trainer: {devices: auto}", "give --devices"),
        (b"trainer: {max_steps: -2}", "max_steps in"),
        (b"trainer: {accumulate_grad_batches: 0}", "accumulate_grad_batches in"),
        (
            b"trainer: {strategy: {class_path: powersgd.PowerSGDStrategy, init_args: {rank: 9}}}",
            "the rank (9) must be a multiple of the shards of PowerSGD (8)",
        ),
    ],
)
def test_mistakes_in_a_config_are_sentences(
    changed: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "changed.yaml").write_bytes(changed)
    with pytest.raises(SystemExit):
        main(["plan", "--config", f"[configs/paper/dalle_1b.yaml, {tmp_path / 'changed.yaml'}]"])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_no_end_is_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "endless.yaml").write_text("trainer: {max_steps: -1}")
    main(["plan", "--config", f"[configs/openmoji/quickstart_dalle.yaml, {tmp_path / 'endless.yaml'}]"])
    assert "trainer.max_steps no end" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("behind", "options", "rows"),
    [
        (  # today's way: eighths of fp32 weights and moments
            [],
            ["--memory", "80GiB"],
            {"weights": "6.15 GB", "the optimizer's moments": "12.29 GB", "two whole blocks, gathered": "1.51 GB"},
        ),
        (  # in this code: the whole model on each device, errors in fp32
            ["sixteen_bit", "powersgd"],
            ["--memory", "16GiB"],
            {"weights": "49.17 GB", "PowerSGD's error": "48.37 GB", "gradients": "49.17 GB"},
        ),
        (  # the paper's own system
            ["powersgd"],
            ["--memory", "16GiB", "--as_the_paper", "true"],
            {"weights": "3.07 GB", "PowerSGD's error": "3.02 GB", "of 16GiB": "16.98 GB (99%)"},
        ),
    ],
)
def test_the_paper_s_configs_are_planned_for_as_they_stand(
    behind: list[str], options: list[str], rows: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    configs = ", ".join(f"configs/paper/{name}.yaml" for name in ["dalle_12b", *behind])
    main(["plan", "--config", f"[{configs}]", *options])
    lines = capsys.readouterr().out.splitlines()
    assert any("12,092.2 M" in line for line in lines)
    assert any("all 430,000 steps" in line for line in lines)
    assert any("86%" in line for line in lines) == ("powersgd" in behind)
    for name, size in rows.items():
        assert any(f" {name} " in line and size in line for line in lines), name
