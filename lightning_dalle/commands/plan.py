"""`plan`: what a fit of a transformer will need, before a device is rented.

Knows configs, units, and what of a config says how a training goes.
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
    from lightning_dalle.cost_model import Bytes, Training
    from lightning_dalle.models.dalle import DALLEConfig

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def plan(
    config: Path | list[Path],
    devices: int | None = None,
    sharded_over: int | None = None,
    memory: str = "80GiB",
    flops: float = 1e14,
    codebook_size: int = 8192,
    grid: int | None = None,
    as_the_paper: bool = False,
) -> None:
    """Print what a fit of a transformer needs: parameters, memory by part, what is sent in a step, and the time.

    Args:
        config: of a fit; its precision, strategy, batch size and steps are what is planned for. Of several, such as
            '[dalle_12b.yaml, powersgd.yaml]', the later ones change the earlier.
        devices: GPUs of all machines together; as the config says if not given.
        sharded_over: how many of them share the parameters, the eight of a machine in the paper; as the config says if
            not given.
        memory: of each device, such as 16GiB.
        flops: floating-point operations a second that each device really does, of the order of half of its peak: 1e14
            is an A100, 3e13 a V100.
        codebook_size: of the dVAE, whose checkpoint is not opened.
        grid: codes along a side, an eighth of the picture if not given.
        as_the_paper: count as the paper's own system would do it, which this code is not: all in 16 bits, split among
            the devices of a machine, and PowerSGD between machines.
    """
    available = _bytes(memory)
    if not 0 < flops < math.inf:
        raise UserError(f"flops are {flops}, but should be operations a second, such as 1e14")
    configs = config if isinstance(config, list) else [config]
    title = " + ".join(map(str, configs))
    settings = Settings(title, reduce(_changed, map(read_yaml, configs), {}))
    shape = _shape(settings, codebook_size, grid)
    how = _training(settings, shape, devices, sharded_over, as_the_paper)
    steps = settings.get("trainer.max_steps", -1)
    if steps != -1:  # Lightning's "without end"
        _count(f"trainer.max_steps in {title}", steps)

    from rich.console import Console
    from rich.table import Table

    from lightning_dalle import cost_model

    numbers, parts, sent = cost_model.parameters(shape), cost_model.memory(shape, how), cost_model.sent(shape, how)
    sheet = Table(title=title, show_header=False, title_justify="left")
    sheet.add_column()
    sheet.add_column(justify="right")
    for name, count in numbers.items():
        sheet.add_row(f"parameters: {name}", f"{count / 1e6:,.1f} M")
    sheet.add_row("parameters", f"{sum(numbers.values()) / 1e6:,.1f} M")
    sheet.add_section()
    for name, size in parts.items():
        if size:
            sheet.add_row(f"on each device: {name}", _size(size))
    needed = sum(parts.values())
    sheet.add_row(f"on each device, of {memory}", f"{_size(needed)} ({needed / available:.0%})")
    sheet.add_section()
    if how.rank is not None:
        sheet.add_row("not sent, thanks to PowerSGD", f"{cost_model.saved_by_powersgd(shape, how):.0%}")
    for name, size in sent.items():
        if size and (how.rank is not None or "PowerSGD" not in name):
            sheet.add_row(f"sent in a step: {name}", _size(size))
    sheet.add_section()
    operations = cost_model.operations(shape, how)
    seconds = operations / how.devices / flops
    sheet.add_row("operations of a step", f"{operations:.2e}")
    sheet.add_row(f"a step at {flops:.0e} a second and device", f"{seconds:,.2f} s")
    if steps != -1:
        sheet.add_row(f"all {steps:,} steps", _duration(seconds * steps))
    Console().print(sheet)
    if steps == -1:
        print(f"how long it takes in all is not said, since {title} gives trainer.max_steps no end")
    if needed > available:
        print(f"it does not fit: {_size(needed)} are needed on each device, but there are {_size(available)}")


@dataclass(frozen=True)
class Settings:
    """What configs say, by dotted names, and the sentences for what they cannot mean."""

    title: str
    values: dict[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """What stands there, or the default if nothing does."""
        section, (*outer, last) = self.values, name.split(".")
        for i, key in enumerate(outer, start=1):
            section = section.get(key, {})
            if not isinstance(section, dict):
                where = ".".join(outer[:i])
                raise UserError(f"{where} in {self.title} should hold keys of its own, but is {section!r}")
        value = section.get(last)
        return default if value is None else value

    def count(self, name: str, default: int) -> int:
        """A whole number above 0."""
        return _count(f"{name} in {self.title}", self.get(name, default))


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}, but should be a whole number above 0")
    return value


def _changed(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of another config in their place."""
    both = {name: _changed(one[name], value) for name, value in other.items() if _are_sections(one.get(name), value)}
    return {**one, **other, **both}


def _are_sections(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _class(value: Any) -> str:
    """The name of what a config chooses, by its class_path or by a word, such as ddp."""
    return str(value.get("class_path") if isinstance(value, dict) else value).rpartition(".")[2]


def _shape(settings: Settings, codebook_size: int, grid: int | None) -> "DALLEConfig":
    from lightning_dalle.models.dalle import DALLEConfig
    from lightning_dalle.models.transformer import TransformerConfig

    title, chosen = settings.title, "model.init_args.config"
    if not str(settings.get("model.class_path")).endswith("LitDALLE"):
        raise UserError(f"a plan is of a transformer, but {title} holds no model of the class LitDALLE")
    for name, default in vars(TransformerConfig()).items():
        if type(default) is int:
            settings.count(f"{chosen}.{name}", default)
    given = settings.get(chosen, {})
    try:
        transformer = TransformerConfig(**given)
    except TypeError as error:
        raise UserError(f"the transformer of {title} is none: {error}") from error
    return DALLEConfig(
        transformer=transformer,
        text_len=settings.count("data.text_len", 256),
        text_vocab_size=settings.count("data.vocab_size", 16384),
        grid=_count("grid", settings.count("data.image_size", 256) // 8 if grid is None else grid),
        codebook_size=_count("codebook_size", codebook_size),
    )


def _training(
    settings: Settings, shape: "DALLEConfig", devices: int | None, sharded_over: int | None, as_the_paper: bool
) -> "Training":
    from lightning_dalle.cost_model import THE_PAPER_S, Training

    title, strategy = settings.title, _class(settings.get("trainer.strategy", "auto"))
    is_split = as_the_paper or strategy == "ModelParallelStrategy"
    if devices is None:
        devices = _devices_of_a_machine(settings, "devices") * settings.count("trainer.num_nodes", 1)
    if sharded_over is None:
        sharded_over = _devices_of_a_machine(settings, "sharded_over") if is_split else 1
    if _count("devices", devices) % _count("sharded_over", sharded_over):
        raise UserError(f"the parameters are shared among {sharded_over} devices, which does not divide {devices}")
    if sharded_over > 1 and not is_split:
        raise UserError(
            f"sharded_over is {sharded_over}, but the strategy of {title}, {strategy}, holds all parameters on each "
            "device: ModelParallelStrategy splits them, and --as_the_paper true plans the paper's own system"
        )
    rank, shards = _powersgd(settings, shape) if strategy == "PowerSGDStrategy" else (None, 8)
    numbers = THE_PAPER_S if as_the_paper else _bytes_of_numbers(settings)
    optimizer = "PaperAdamW" if as_the_paper else _class(settings.get("model.init_args.optimizer", "AdamW"))
    if is_split and not as_the_paper and optimizer in ("PaperAdamW", "MuonAdamW"):
        raise UserError(f"{optimizer} of {title} needs whole matrices, but {strategy} splits them: take AdamW")
    # Two moments of 16 bits; Muon's one; Adam's two.
    moments = {"PaperAdamW": 2 * 2.0, "MuonAdamW": numbers.weights}.get(optimizer, 2 * numbers.weights)
    return Training(
        devices=devices,
        sharded_over=sharded_over,
        batch_size=settings.count("data.batch_size", 32),
        accumulated=settings.count("trainer.accumulate_grad_batches", 1),
        bytes=numbers,
        moments=moments,
        checkpoints_activations=bool(settings.get("model.init_args.checkpoint_activations")),
        rank=rank,
        shards=shards,
    )


def _devices_of_a_machine(settings: Settings, option: str) -> int:
    devices = settings.get("trainer.devices", 1)
    if not isinstance(devices, int) or devices == -1:  # Lightning's "auto", "all that there are" or a list of them
        raise UserError(
            f"trainer.devices in {settings.title} is {devices!r}, which is no number to plan for: give --{option}"
        )
    return _count(f"trainer.devices in {settings.title}", devices)


def _powersgd(settings: Settings, shape: "DALLEConfig") -> tuple[int, int]:
    """Its rank and shards, which have to be what PowerSGDStrategy takes."""
    rank = settings.count("trainer.strategy.init_args.rank", 0)
    shards, width = settings.count("trainer.strategy.init_args.shards", 8), shape.transformer.n_embd
    for what, size in (("rank", rank), ("width", width)):
        if size % shards:
            raise UserError(f"the {what} ({size}) must be a multiple of the shards of PowerSGD ({shards})")
    return rank, shards


def _bytes_of_numbers(settings: Settings) -> "Bytes":
    from lightning_dalle.cost_model import PRECISIONS

    plugins = settings.get("trainer.plugins", [])
    classes = [_class(plugin) for plugin in (plugins if isinstance(plugins, list) else [plugins])]
    precision = str(settings.get("trainer.precision", "32-true"))
    if "PaperPrecision" in classes:
        precision = "PaperPrecision"
    elif "NativeBF16" in classes:
        precision = "bf16-mixed"
    if precision not in PRECISIONS:
        known = ", ".join(PRECISIONS)
        raise UserError(f"the precision of {settings.title} is {precision}, but there are plans for {known}")
    return PRECISIONS[precision]


def _bytes(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(\w+)\s*", text)
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise UserError(
            f"memory is {text!r}, but should be a number above 0 and one of {', '.join(UNITS)}, such as 16GiB"
        )
    return float(match[1]) * UNITS[match[2]]


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds >= 86400 else f"{seconds / 60:,.1f} minutes"
