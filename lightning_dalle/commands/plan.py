"""`plan`: read the configs of a fit and print the costs that `cost_model` estimates, before renting devices."""

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
        shard_group: number of devices that share one copy of the parameters (8 in the paper); by default the config's.
        memory: memory of each device, such as 16GiB.
        flops: floating-point operations per second that each device reaches, about half of its peak: 1e14 for an A100,
            3e13 for a V100.
        codebook_size: codebook size of the dVAE, whose checkpoint is not opened.
        grid: codes per side; by default an eighth of the image size.
        paper_system: plan the paper's own system, which this code does not implement: all numbers in 16 bits,
            parameters sharded within a machine, PowerSGD between machines.
    """
    available = _parse_memory(memory)
    if not 0 < flops < float("inf"):
        raise UserError(f"flops is {flops}; expected operations per second above 0, such as 1e14")
    files = config if isinstance(config, list) else [config]
    fit = FitConfig(" + ".join(map(str, files)), reduce(_merge, map(read_yaml, files), {}))
    model = _model_config(fit, codebook_size, grid)
    setup = _training_setup(fit, model.transformer.n_embd, devices, shard_group, paper_system)
    steps = None if fit.get("trainer.max_steps", -1) == -1 else fit.count("trainer.max_steps")

    from lightning_dalle import cost_model

    counts, parts = cost_model.count_parameters(model), cost_model.memory_per_device(model, setup)
    counts["total"], needed = sum(counts.values()), sum(parts.values())
    rows = [(f"parameters: {name}", f"{count / 1e6:,.1f} M") for name, count in counts.items()]
    rows += [(f"memory per device: {name}", _format_bytes(size)) for name, size in parts.items() if size]
    rows += [(f"memory per device: total, of {memory}", f"{_format_bytes(needed)} ({needed / available:.0%})")]
    if setup.rank is not None:
        rows += [("gradient bytes that PowerSGD saves", f"{cost_model.powersgd_savings(model, setup):.0%}")]
    for name, size in cost_model.communication(model, setup).items():
        if size and (setup.rank is not None or "PowerSGD" not in name):
            rows += [(f"sent per step and device: {name}", _format_bytes(size))]
    step_flops = cost_model.flops(model, setup)
    seconds = step_flops / setup.devices / flops
    rows += [("FLOPs per step", f"{step_flops:.2e}")]
    rows += [(f"time per step at {flops:.0e} FLOP/s per device", f"{seconds:,.2f} s")]
    if steps is None:
        rows += [("time of all steps", "endless: max_steps is -1")]
    else:
        rows += [(f"time of all {steps:,} steps", _format_duration(seconds * steps))]
    print(fit.files)
    for name, value in rows:
        print(f"{name:<58} {value:>20}")
    if needed > available:
        print(f"does not fit: each device needs {_format_bytes(needed)} but has {_format_bytes(available)}")


@dataclass(frozen=True)
class FitConfig:
    """Merged keys of a fit's config files, and the names of the files for error messages."""

    files: str
    keys: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a dotted config key, or the default if it is missing or null."""
        value: Any = self.keys
        for name in key.split("."):
            if not isinstance(value, dict):
                raise UserError(f"cannot read {key} in {self.files}: expected a mapping of keys, but found {value!r}")
            value = value.get(name)
            if value is None:
                return default
        return value

    def count(self, key: str, default: int | None = None, remedy: str = "") -> int:
        """Return the value of a config key that must be a positive integer; `remedy` ends the error message."""
        return _check_count(f"{key} in {self.files}", self.get(key, default), remedy)


def _check_count(name: str, value: Any, remedy: str = "") -> int:
    if type(value) is not int or value < 1:
        raise UserError(f"{name} is {value!r}; expected a whole number above 0{remedy}")
    return value


def _merge(base: Any, override: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(override, dict)):
        return override
    return base | {name: _merge(base.get(name), value) for name, value in override.items()}


def _class_name(value: Any) -> str:
    """Return the class name in the value of a config key, which may be a plain word such as ddp."""
    return str(value.get("class_path") if isinstance(value, dict) else value).rpartition(".")[2]


def _model_config(fit: FitConfig, codebook_size: int, grid: int | None) -> "DALLEConfig":
    from lightning_dalle.models.dalle import DALLEConfig
    from lightning_dalle.models.transformer import TransformerConfig

    model, key = _class_name(fit.get("model")), "model.init_args.config"
    if model != "LitDALLE":
        raise UserError(f"plan needs the config of a LitDALLE, but the model class in {fit.files} is {model}")
    for name, default in vars(TransformerConfig()).items():
        if type(default) is int:
            fit.count(f"{key}.{name}", default)
    try:
        transformer = TransformerConfig(**fit.get(key, {}))
    except TypeError as error:
        raise UserError(f"{key} in {fit.files} is not a TransformerConfig ({error}); correct its keys") from error
    return DALLEConfig(
        transformer=transformer,
        text_len=fit.count("data.text_len", 256),
        text_vocab_size=fit.count("data.vocab_size", 16384),
        grid=_check_count("grid", fit.count("data.image_size", 256) // 8 if grid is None else grid),
        codebook_size=_check_count("codebook_size", codebook_size),
    )


def _training_setup(
    fit: FitConfig, width: int, devices: int | None, shard_group: int | None, paper_system: bool
) -> "TrainingSetup":
    from lightning_dalle.cost_model import PAPER, TrainingSetup

    strategy = _class_name(fit.get("trainer.strategy", "auto"))
    is_sharded = paper_system or strategy == "ModelParallelStrategy"
    remedy = ", or give --devices and --shard_group"  # the key may also be "auto", -1 for all devices, or a list
    if devices is None:
        devices = fit.count("trainer.devices", 1, remedy) * fit.count("trainer.num_nodes", 1)
    if shard_group is None:
        shard_group = fit.count("trainer.devices", 1, remedy) if is_sharded else 1
    if _check_count("devices", devices) % _check_count("shard_group", shard_group):
        raise UserError(f"shard_group is {shard_group}, which does not divide {devices} devices: choose a divisor")
    if shard_group > 1 and not is_sharded:
        raise UserError(
            f"shard_group is {shard_group}, but the strategy of {fit.files}, {strategy}, holds all parameters on "
            "each device; use ModelParallelStrategy to shard them, or --paper_system true for the paper's own system"
        )
    if paper_system:
        size, optimizer = PAPER, "PaperAdamW"
    else:
        size, optimizer = _bytes_of_precision(fit), _class_name(fit.get("model.init_args.optimizer", "AdamW"))
        if is_sharded and optimizer in ("PaperAdamW", "MuonAdamW"):
            raise UserError(f"{optimizer} of {fit.files} needs whole matrices, but {strategy} shards them; use AdamW")
    rank, shards = None, 8
    if strategy == "PowerSGDStrategy":
        rank = fit.count("trainer.strategy.init_args.rank")
        shards = fit.count("trainer.strategy.init_args.shards", shards)
        if rank % shards or width % shards:
            raise UserError(f"rank={rank} and n_embd={width} must both be multiples of PowerSGD's shards={shards}")
    return TrainingSetup(
        devices=devices,
        shard_group=shard_group,
        batch_size=fit.count("data.batch_size", 32),
        accumulate_grad_batches=fit.count("trainer.accumulate_grad_batches", 1),
        bytes=size,
        # PaperAdamW has two 16-bit moments, MuonAdamW one moment, AdamW two.
        moments={"PaperAdamW": 2 * 2.0, "MuonAdamW": size.weights}.get(optimizer, 2 * size.weights),
        checkpoint_activations=bool(fit.get("model.init_args.checkpoint_activations")),
        rank=rank,
        shards=shards,
    )


def _bytes_of_precision(fit: FitConfig) -> "Bytes":
    from lightning_dalle.cost_model import PRECISIONS

    plugins = fit.get("trainer.plugins", [])
    names = [_class_name(plugin) for plugin in (plugins if isinstance(plugins, list) else [plugins])]
    precision = next((name for name in names if name in PRECISIONS), str(fit.get("trainer.precision", "32-true")))
    if precision not in PRECISIONS:
        raise UserError(f"the precision of {fit.files} is {precision}; plan supports {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def _parse_memory(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG])(i?)B", text.strip())
    if match is None or not float(match[1]):
        raise UserError(f"memory is {text!r}; expected a number above 0 and KB, MB, GB, KiB, MiB or GiB, such as 16GiB")
    return float(match[1]) * (1024 if match[3] else 1000) ** ("KMG".index(match[2]) + 1)


def _format_bytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _format_duration(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds >= 86400 else f"{seconds / 60:,.1f} minutes"
