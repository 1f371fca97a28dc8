"""`plan`: estimate the cost of training a transformer from its config, before renting devices.

The arithmetic is in `cost_model`; this module reads configs and prints the table.
"""

import math
import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dalle.errors import UserError
from lightning_dalle.files import read_yaml

if TYPE_CHECKING:
    from lightning_dalle.cost_model import Bytes, TrainingSetup
    from lightning_dalle.models.dalle import DALLEConfig

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def plan(
    config: Path | list[Path],
    devices: int | None = None,
    shard_group: int | None = None,
    memory: str = "80GiB",
    flops: float = 1e14,
    codebook_size: int = 8192,
    grid: int | None = None,
    paper_system: bool = False,
) -> None:
    """Print what training a transformer needs: parameters, memory per device, communication and time per step.

    Args:
        config: config of a fit, which sets precision, strategy, batch size and steps. In a list such as
            '[dalle_12b.yaml, powersgd.yaml]', later files override earlier ones.
        devices: number of GPUs on all machines together; by default that of the config.
        shard_group: number of devices that share one copy of the parameters, 8 in the paper; by default that of the
            config.
        memory: memory of each device, such as 16GiB.
        flops: floating-point operations per second that each device reaches, about half of its peak: 1e14 for an A100,
            3e13 for a V100.
        codebook_size: codebook size of the dVAE, whose checkpoint is not opened.
        grid: codes per side; by default an eighth of the image size.
        paper_system: plan the paper's own system, which this code does not implement: all numbers in 16 bits,
            parameters sharded within a machine, PowerSGD between machines.
    """
    available = _parse_memory(memory)
    if not 0 < flops < math.inf:
        raise UserError(f"flops is {flops}; expected operations per second above 0, such as 1e14")
    files = config if isinstance(config, list) else [config]
    merged = MergedConfig(" + ".join(map(str, files)), reduce(_merge, map(read_yaml, files), {}))
    model = _model_config(merged, codebook_size, grid)
    setup = _training_setup(merged, model, devices, shard_group, paper_system)
    steps = merged.get("trainer.max_steps", -1)
    if steps != -1:  # -1 trains without end
        _check_count(f"trainer.max_steps in {merged.files}", steps)

    from rich.console import Console
    from rich.table import Table

    from lightning_dalle import cost_model

    table = Table(title=merged.files, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    counts = cost_model.count_parameters(model)
    for name, count in {**counts, "total": sum(counts.values())}.items():
        table.add_row(f"parameters: {name}", f"{count / 1e6:,.1f} M")
    table.add_section()
    parts = cost_model.memory_per_device(model, setup)
    for name, size in parts.items():
        if size:
            table.add_row(f"memory per device: {name}", _format_bytes(size))
    needed = sum(parts.values())
    table.add_row(f"memory per device: total, of {memory}", f"{_format_bytes(needed)} ({needed / available:.0%})")
    table.add_section()
    if setup.rank is not None:
        table.add_row("gradient bytes that PowerSGD saves", f"{cost_model.powersgd_savings(model, setup):.0%}")
    for name, size in cost_model.communication(model, setup).items():
        if size and (setup.rank is not None or "PowerSGD" not in name):
            table.add_row(f"sent per step and device: {name}", _format_bytes(size))
    table.add_section()
    step_flops = cost_model.flops(model, setup)
    seconds = step_flops / setup.devices / flops
    table.add_row("FLOPs per step", f"{step_flops:.2e}")
    table.add_row(f"time per step at {flops:.0e} FLOP/s per device", f"{seconds:,.2f} s")
    if steps != -1:
        table.add_row(f"time of all {steps:,} steps", _format_duration(seconds * steps))
    Console().print(table)
    if steps == -1:
        print(f"no total time: trainer.max_steps in {merged.files} is -1, which trains without end")
    if needed > available:
        print(f"does not fit: each device needs {_format_bytes(needed)} but has {_format_bytes(available)}")


@dataclass(frozen=True)
class MergedConfig:
    """Keys of several config files, and the names of the files for error messages."""

    files: str
    values: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted config key, or the default if it is missing or null."""
        section, (*outer, last) = self.values, key.split(".")
        for i, name in enumerate(outer, start=1):
            section = section.get(name, {})
            if not isinstance(section, dict):
                raise UserError(f"{'.'.join(outer[:i])} in {self.files} must be a mapping of keys, but is {section!r}")
        value = section.get(last)
        return default if value is None else value

    def count(self, key: str, default: int) -> int:
        """Return the value of a config key that must be a positive integer."""
        return _check_count(f"{key} in {self.files}", self.get(key, default))

    def class_name(self, key: str, default: str) -> str:
        """Return the last part of the class_path under a config key, or of a plain word such as ddp."""
        return _class_name(self.get(key, default))


def _check_count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}; expected a whole number above 0")
    return value


def _merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in override.items():
        is_section = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = _merge(base[name], value) if is_section else value
    return merged


def _class_name(value: Any) -> str:
    return str(value.get("class_path") if isinstance(value, dict) else value).rpartition(".")[2]


def _model_config(merged: MergedConfig, codebook_size: int, grid: int | None) -> "DALLEConfig":
    from lightning_dalle.models.dalle import DALLEConfig
    from lightning_dalle.models.transformer import TransformerConfig

    model, key = merged.class_name("model", "None"), "model.init_args.config"
    if model != "LitDALLE":
        raise UserError(f"plan needs the config of a LitDALLE, but the model class in {merged.files} is {model}")
    for name, default in vars(TransformerConfig()).items():
        if type(default) is int:
            merged.count(f"{key}.{name}", default)
    try:
        transformer = TransformerConfig(**merged.get(key, {}))
    except TypeError as error:
        raise UserError(f"{key} in {merged.files} is not a TransformerConfig: {error}") from error
    return DALLEConfig(
        transformer=transformer,
        text_len=merged.count("data.text_len", 256),
        text_vocab_size=merged.count("data.vocab_size", 16384),
        grid=_check_count("grid", merged.count("data.image_size", 256) // 8 if grid is None else grid),
        codebook_size=_check_count("codebook_size", codebook_size),
    )


def _training_setup(
    merged: MergedConfig, model: "DALLEConfig", devices: int | None, shard_group: int | None, paper_system: bool
) -> "TrainingSetup":
    from lightning_dalle.cost_model import PAPER, TrainingSetup

    strategy = merged.class_name("trainer.strategy", "auto")
    is_sharded = paper_system or strategy == "ModelParallelStrategy"
    if devices is None:
        devices = _devices_per_machine(merged, "devices") * merged.count("trainer.num_nodes", 1)
    if shard_group is None:
        shard_group = _devices_per_machine(merged, "shard_group") if is_sharded else 1
    if _check_count("devices", devices) % _check_count("shard_group", shard_group):
        raise UserError(f"shard_group is {shard_group}, which does not divide {devices} devices")
    if shard_group > 1 and not is_sharded:
        raise UserError(
            f"shard_group is {shard_group}, but the strategy of {merged.files}, {strategy}, holds all parameters on "
            "each device; use ModelParallelStrategy to shard them, or --paper_system true for the paper's own system"
        )
    rank, shards = _powersgd_shape(merged, model) if strategy == "PowerSGDStrategy" else (None, 8)
    size = PAPER if paper_system else _bytes_of_precision(merged)
    optimizer = "PaperAdamW" if paper_system else merged.class_name("model.init_args.optimizer", "AdamW")
    if is_sharded and not paper_system and optimizer in ("PaperAdamW", "MuonAdamW"):
        raise UserError(f"{optimizer} of {merged.files} needs whole matrices, but {strategy} shards them; use AdamW")
    # PaperAdamW: two 16-bit moments. MuonAdamW: one moment. AdamW: two.
    moments = {"PaperAdamW": 2 * 2.0, "MuonAdamW": size.weights}.get(optimizer, 2 * size.weights)
    return TrainingSetup(
        devices=devices,
        shard_group=shard_group,
        batch_size=merged.count("data.batch_size", 32),
        accumulate_grad_batches=merged.count("trainer.accumulate_grad_batches", 1),
        bytes=size,
        moments=moments,
        checkpoint_activations=bool(merged.get("model.init_args.checkpoint_activations")),
        rank=rank,
        shards=shards,
    )


def _devices_per_machine(merged: MergedConfig, option: str) -> int:
    devices = merged.get("trainer.devices", 1)
    if not isinstance(devices, int) or devices == -1:  # "auto", -1 for all, or a list of devices
        raise UserError(f"trainer.devices in {merged.files} is {devices!r}, which is not a count: give --{option}")
    return _check_count(f"trainer.devices in {merged.files}", devices)


def _powersgd_shape(merged: MergedConfig, model: "DALLEConfig") -> tuple[int, int]:
    """Return rank and shards of PowerSGDStrategy, after the checks that it makes itself."""
    rank = merged.count("trainer.strategy.init_args.rank", 0)
    shards = merged.count("trainer.strategy.init_args.shards", 8)
    for name, value in (("rank", rank), ("width", model.transformer.n_embd)):
        if value % shards:
            raise UserError(f"the {name} ({value}) must be a multiple of the shards of PowerSGD ({shards})")
    return rank, shards


def _bytes_of_precision(merged: MergedConfig) -> "Bytes":
    from lightning_dalle.cost_model import PRECISIONS

    plugins = merged.get("trainer.plugins", [])
    classes = [_class_name(plugin) for plugin in (plugins if isinstance(plugins, list) else [plugins])]
    precision = str(merged.get("trainer.precision", "32-true"))
    if "PaperPrecision" in classes:
        precision = "PaperPrecision"
    elif "NativeBF16" in classes:
        precision = "bf16-mixed"
    if precision not in PRECISIONS:
        raise UserError(f"the precision of {merged.files} is {precision}; plan supports {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def _parse_memory(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w+)\s*", text)
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise UserError(f"memory is {text!r}; expected a number above 0 and one of {', '.join(UNITS)}, such as 16GiB")
    return float(match[1]) * UNITS[match[2]]


def _format_bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _format_duration(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds >= 86400 else f"{seconds / 60:,.1f} minutes"
