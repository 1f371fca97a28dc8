"""Cost model against the paper's figures and against small measured runs; errors of the `plan` command."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_dalle.cli import main
from lightning_dalle.cost_model import (
    PAPER,
    PRECISIONS,
    TrainingSetup,
    communication,
    count_parameters,
    flops,
    memory_per_device,
    powersgd_savings,
)
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.training.distributed.powersgd import PowerSGDStrategy
from lightning_dalle.training.optim.adamw16 import PaperAdamW
from lightning_dalle.training.optim.muon import MuonAdamW
from lightning_dalle.training.optim.param_groups import param_groups

PAPER_12B = DALLEConfig(
    transformer=TransformerConfig(), text_len=256, text_vocab_size=16384, grid=32, codebook_size=8192
)  # fmt: skip
PAPER_SETUP = TrainingSetup(
    devices=1024, shard_group=8, batch_size=1, accumulate_grad_batches=1, bytes=PAPER, moments=4.0,
    checkpoint_activations=True, rank=896, shards=8,
)  # fmt: skip
SMALL = DALLEConfig(
    transformer=TransformerConfig(n_layer=4, n_head=4, n_embd=256), text_len=8, text_vocab_size=300, grid=4,
    codebook_size=64,
)  # fmt: skip
ALONE = TrainingSetup(
    devices=1, shard_group=1, batch_size=2, accumulate_grad_batches=1, bytes=PRECISIONS["32-true"], moments=8.0,
    checkpoint_activations=False, rank=None, shards=8,
)  # fmt: skip


def test_the_papers_weights() -> None:
    assert count_parameters(PAPER_12B)["blocks"] == 12 * 3968**2 * 64
    assert round(2 * count_parameters(PAPER_12B)["blocks"] / 1e9) == 24  # "the parameters take 24 GB in 16 bits"


@pytest.mark.parametrize(("width", "rank", "percent"), [(1920, 512, 83), (2688, 640, 85), (3968, 896, 86)])
def test_the_papers_compression(width: int, rank: int, percent: int) -> None:
    config = replace(PAPER_12B, transformer=TransformerConfig(n_embd=width, n_head=width // 64))
    saved = powersgd_savings(config, replace(PAPER_SETUP, rank=rank))
    assert saved == pytest.approx(1 - 5 * rank / (8 * width))
    assert round(100 * saved) == percent


@pytest.mark.parametrize("rank", [16, 64, 128, 256, 512])
def test_powersgd_savings_are_those_of_the_strategy(rank: int) -> None:
    matrices = PowerSGDStrategy(rank=rank)._new_states(DALLE(SMALL)).values()
    sends = sum(matrix.numel_sent for matrix in matrices) / sum(matrix.error.numel() for matrix in matrices)
    assert powersgd_savings(SMALL, replace(ALONE, rank=rank)) == pytest.approx(1 - sends)


def test_the_papers_training_fits_its_gpus_only_when_sharded() -> None:
    assert sum(memory_per_device(PAPER_12B, PAPER_SETUP).values()) < 16 * 2**30
    whole = sum(memory_per_device(PAPER_12B, replace(PAPER_SETUP, shard_group=1)).values())
    assert whole > 16 * 2**30


def test_powersgd_reduces_the_communication() -> None:
    plain = communication(PAPER_12B, replace(PAPER_SETUP, rank=None))["between replicas, PowerSGD"]
    assert plain == communication(PAPER_12B, PAPER_SETUP)["between replicas, uncompressed"]
    assert communication(PAPER_12B, PAPER_SETUP)["between replicas, PowerSGD"] == pytest.approx(0.155 * plain, rel=0.02)
    assert all(size == 0 for size in communication(PAPER_12B, ALONE).values())


def step(model: DALLE) -> torch.Tensor:
    text, codes = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)
    logits = model(text, codes)
    return dalle_loss(logits.text, logits.image, text, codes, 7.0)["loss"]


@pytest.mark.parametrize(
    ("optimizer", "moments"), [(torch.optim.AdamW, 8.0), (PaperAdamW, 4.0), (MuonAdamW, 4.0)]
)  # fmt: skip
def test_weights_gradients_and_moments_equal_those_of_a_step(
    optimizer: type[torch.optim.Optimizer], moments: float
) -> None:
    model = DALLE(SMALL)
    new = optimizer(param_groups(model))  # type: ignore[call-arg]
    step(model).backward()
    new.step()
    planned = memory_per_device(SMALL, replace(ALONE, moments=moments))
    assert planned["weights"] == sum(p.nbytes for p in model.parameters())
    assert planned["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    kept = [value for state in new.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert planned["optimizer moments"] == sum(moment.nbytes for moment in kept if moment.ndim)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activations_and_cast_weights_equal_what_autograd_saves(precision: str) -> None:
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
    planned = memory_per_device(SMALL, replace(ALONE, bytes=PRECISIONS[precision]))
    both = planned["activations"] + planned["weights cast for matrix products"]
    assert both == pytest.approx(sum(kept.values()), rel=0.08)


def test_sharded_weights_are_gathered_in_their_own_precision() -> None:
    how = replace(ALONE, devices=4, shard_group=2, checkpoint_activations=True, bytes=PRECISIONS["bf16-mixed"])
    numbers, block = sum(count_parameters(SMALL).values()), count_parameters(SMALL)["blocks"] / 4
    planned = memory_per_device(SMALL, how)
    assert planned["two gathered blocks"] == 2 * block * 4
    assert planned["weights cast for matrix products"] == block * 2  # of the current block
    assert communication(SMALL, how)["within a replica"] == numbers / 2 * (2 * 4 + 4)


@pytest.mark.parametrize(("shard_group", "times"), [(1, 1), (2, 3)])  # DDP waits for the last batch, FSDP2 does not
def test_a_step_includes_all_accumulated_batches(shard_group: int, times: int) -> None:
    once = replace(ALONE, devices=4, shard_group=shard_group)
    thrice = replace(once, accumulate_grad_batches=3)
    assert flops(SMALL, thrice) == 3 * flops(SMALL, once)
    expected = {name: times * size for name, size in communication(SMALL, once).items()}
    assert communication(SMALL, thrice) == pytest.approx(expected)


def test_flops_equal_what_torch_counts() -> None:
    model = DALLE(SMALL)
    with FlopCounterMode(display=False) as counter:
        step(model).backward()
    assert flops(SMALL, ALONE) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_flops_depend_on_the_attention_patterns() -> None:
    full = replace(SMALL, transformer=replace(SMALL.transformer, attention=["full"], last_attention="full"))
    pairs = [
        sum(int(pattern.mask().sum()) for pattern in DALLE(config).transformer.patterns) for config in (SMALL, full)
    ]
    assert pairs[1] == 4 * 24 * 25 / 2 > pairs[0]
    # Two products of two operations per channel and visible pair, forward and twice that backward, for two images.
    assert flops(full, ALONE) - flops(SMALL, ALONE) == 2 * 3 * 4 * 256 * (pairs[1] - pairs[0])


def test_plan_reads_the_config_of_a_fit(capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", "configs/openmoji/quickstart_dalle.yaml"]
    main(["plan", *config, "--memory", "8GiB", "--codebook_size", "512", "--grid", "8"])
    assert "3.1 M" in capsys.readouterr().out
    main(["plan", *config, "--memory", "1MiB"])
    assert "does not fit: each device needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--config configs/openmoji/quickstart_dvae.yaml",
            "plan needs the config of a LitDALLE, but the model class in configs/openmoji/quickstart_dvae.yaml is ",
        ),
        ("--config configs/paper/dalle_12b.yaml --devices 6 --shard_group 4", "does not divide 6 devices: choose a"),
        ("--config nowhere.yaml", "cannot read the config "),
        ("--config configs/paper/dalle_1b.yaml --shard_group 8", "ddp, holds all parameters on each device; use Model"),
        (
            "--config=[configs/paper/dalle_12b.yaml,configs/paper/powersgd.yaml] --shard_group 8",
            "PowerSGDStrategy, holds all parameters on each device",
        ),
        ("--config=[configs/paper/dalle_12b.yaml,configs/paper/fp16_per_block_scale.yaml]", "PaperAdamW of"),
        ("--config configs/coco/dalle.yaml --memory 16", "memory is '16'"),
        ("--config configs/coco/dalle.yaml --memory 1.2.3GiB", "memory is '1.2.3GiB'"),
        ("--config configs/coco/dalle.yaml --memory 0GiB", "memory is '0GiB'"),
        ("--config configs/coco/dalle.yaml --flops 0", "flops is 0.0; expected"),
        ("--config configs/coco/dalle.yaml --devices 0", "devices is 0"),
        ("--config configs/coco/dalle.yaml --shard_group 0", "shard_group is 0"),
        ("--config configs/coco/dalle.yaml --grid 0", "grid is 0"),
        ("--config configs/coco/dalle.yaml --codebook_size -3", "codebook_size is -3"),
    ],
)
def test_wrong_options_are_reported(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *options.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (b"\xff\xfe\x00", "cannot read the config "),
        (b"model:", "but the model class in"),
        (b"data: other.yaml", "expected a mapping of keys, but found 'other.yaml'"),
        (b"model: {init_args: {config: {n_head: 0}}}", "model.init_args.config.n_head in"),
        (b"model: {init_args: {config: {heads: 1}}}", "got an unexpected keyword argument 'heads'); correct its keys"),
        (b"model: {init_args: {config: {attention: row}}}", "attention is 'row'; expected a list of patterns"),
        (
            b"model: {init_args: {config: {attention: [rwo]}}}",
            "attention pattern 'rwo' is unknown; expected full, row,",
        ),
        (b"trainer: {devices: -1}", "is -1; expected a whole number above 0, or give --devices"),
        (b"trainer: {devices: auto}", "is 'auto'; expected a whole number above 0, or give --devices"),
        (b"trainer: {max_steps: -2}", "is -2; expected a whole number above 0"),
        (b"trainer: {accumulate_grad_batches: 0}", "is 0; expected a whole number above 0"),
        (
            b"trainer: {strategy: {class_path: powersgd.PowerSGDStrategy, init_args: {rank: 9}}}",
            "rank=9 and n_embd=1792 must both be multiples of PowerSGD's shards=8",
        ),
    ],
)
def test_wrong_configs_are_reported(
    changed: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "changed.yaml").write_bytes(changed)
    with pytest.raises(SystemExit):
        main(["plan", "--config", f"[configs/paper/dalle_1b.yaml, {tmp_path / 'changed.yaml'}]"])
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_endless_training_has_no_total_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "endless.yaml").write_text("trainer: {max_steps: -1}")
    main(["plan", "--config", f"[configs/openmoji/quickstart_dalle.yaml, {tmp_path / 'endless.yaml'}]"])
    assert "endless: max_steps is -1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "options", "rows"),
    [
        (  # this code: fp32 weights and moments sharded among 8 devices
            [],
            ["--memory", "80GiB"],
            {"weights": "6.15 GB", "optimizer moments": "12.29 GB", "two gathered blocks": "1.51 GB"},
        ),
        (  # this code: the whole model on each device, errors in fp32
            ["fp16_per_block_scale", "powersgd"],
            ["--memory", "16GiB"],
            {"weights": "49.17 GB", "PowerSGD error": "48.37 GB", "gradients": "49.17 GB"},
        ),
        (  # the paper's own system
            ["powersgd"],
            ["--memory", "16GiB", "--paper_system", "true"],
            {"weights": "3.07 GB", "PowerSGD error": "3.02 GB", "of 16GiB": "16.98 GB (99%)"},
        ),
    ],
)
def test_plans_of_the_papers_configs(
    overrides: list[str], options: list[str], rows: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    configs = ", ".join(f"configs/paper/{name}.yaml" for name in ["dalle_12b", *overrides])
    main(["plan", "--config", f"[{configs}]", *options])
    lines = capsys.readouterr().out.splitlines()
    assert any("12,092.2 M" in line for line in lines)
    assert any("time of all 430,000 steps" in line for line in lines)
    assert any("86%" in line for line in lines) == ("powersgd" in overrides)
    for name, size in rows.items():
        assert any(f" {name} " in line and size in line for line in lines), name
