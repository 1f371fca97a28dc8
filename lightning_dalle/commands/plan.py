"""`plan`: what a fit of a transformer will need, before a device is rented.

Knows configs, units, and what of a config says how a training goes.
"""

import re
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dalle.errors import UserError

if TYPE_CHECKING:
    from lightning_dalle.models.dalle import DALLEConfig
    from lightning_dalle.planning import Training

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def plan(
    config: Path | list[Path],
    devices: int | None = None,
    sharded_over: int | None = None,
    memory: str = "80GiB",
    flops: float = 1e14,
    codebook_size: int = 8192,
    grid: int | None = None,
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
    """
    available = _bytes(memory)
    configs = config if isinstance(config, list) else [config]
    settings: dict[str, Any] = reduce(_changed, map(_read, configs), {})
    title = " + ".join(map(str, configs))
    shape = _shape(title, settings, codebook_size, grid)
    how = _training(title, settings, devices, sharded_over)

    from rich.console import Console
    from rich.table import Table

    from lightning_dalle import planning

    numbers, parts, sent = planning.parameters(shape), planning.memory(shape, how), planning.sent(shape, how)
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
        sheet.add_row("not sent, thanks to PowerSGD", f"{planning.saved_by_powersgd(shape, how):.0%}")
    for name, size in sent.items():
        if size and (how.rank is not None or "PowerSGD" not in name):
            sheet.add_row(f"sent in a step: {name}", _size(size))
    sheet.add_section()
    operations = planning.operations(shape, how)
    seconds = operations / how.devices / flops
    sheet.add_row("operations of a step", f"{operations:.2e}")
    sheet.add_row(f"a step at {flops:.0e} a second and device", f"{seconds:,.2f} s")
    steps = settings.get("trainer", {}).get("max_steps")
    if steps:
        sheet.add_row(f"all {steps:,} steps", _duration(seconds * steps))
    Console().print(sheet)
    if needed > available:
        print(f"it does not fit: {_size(needed)} are needed on each device, but there are {_size(available)}")


def _read(config: Path) -> dict[str, Any]:
    import yaml

    try:
        settings = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"the config {config} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"the config {config} should hold the keys of a fit, but holds {settings!r}")
    return settings


def _changed(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of another config in their place."""
    both = {name: _changed(one[name], value) for name, value in other.items() if _are_sections(one.get(name), value)}
    return {**one, **other, **both}


def _are_sections(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _shape(title: str, settings: dict[str, Any], codebook_size: int, grid: int | None) -> "DALLEConfig":
    from lightning_dalle.models.dalle import DALLEConfig
    from lightning_dalle.models.transformer import TransformerConfig

    model, data = settings.get("model", {}), settings.get("data", {})
    if not str(model.get("class_path")).endswith("LitDALLE"):
        raise UserError(f"a plan is of a transformer, but {title} holds no model of the class LitDALLE")
    try:
        transformer = TransformerConfig(**model.get("init_args", {}).get("config", {}))
    except TypeError as error:
        raise UserError(f"the transformer of {title} is none: {error}") from error
    return DALLEConfig(
        transformer=transformer,
        text_len=data.get("text_len", 256),
        text_vocab_size=data.get("vocab_size", 16384),
        grid=data.get("image_size", 256) // 8 if grid is None else grid,
        codebook_size=codebook_size,
    )


def _training(title: str, settings: dict[str, Any], devices: int | None, sharded_over: int | None) -> "Training":
    from lightning_dalle.planning import PRECISIONS, Training

    trainer, model = settings.get("trainer", {}), settings["model"].get("init_args", {})
    of_a_machine = trainer.get("devices", 1)
    if devices is None:
        if not isinstance(of_a_machine, int):
            raise UserError(f"devices in {title} are {of_a_machine}, which is no number to plan for: give --devices")
        devices = of_a_machine * trainer.get("num_nodes", 1)
    plugins = [plugin["class_path"].rpartition(".")[2] for plugin in trainer.get("plugins") or []]
    precision = str(trainer.get("precision") or "32-true")
    if "PaperPrecision" in plugins:
        precision = "paper"
    elif "NativeBF16" in plugins:
        precision = "bf16-mixed"
    if precision not in PRECISIONS:
        raise UserError(f"the precision of {title} is {precision}, but there are plans for {', '.join(PRECISIONS)}")
    strategy = trainer.get("strategy")
    strategy = strategy if isinstance(strategy, dict) else {"class_path": ""}
    name, given = strategy["class_path"].rpartition(".")[2], strategy.get("init_args", {})
    powersgd = given if name == "PowerSGDStrategy" else {}
    if sharded_over is None:  # ours splits the parameters among the devices of a machine
        sharded_over = of_a_machine if name == "ModelParallelStrategy" and isinstance(of_a_machine, int) else 1
    if devices % sharded_over:
        raise UserError(f"the parameters are shared among {sharded_over} devices, which does not divide {devices}")
    return Training(
        devices=devices,
        sharded_over=sharded_over,
        batch_size=settings.get("data", {}).get("batch_size", 32),
        bytes=PRECISIONS[precision],
        checkpoints_activations=bool(model.get("checkpoint_activations")),
        rank=powersgd.get("rank"),
        shards=powersgd.get("shards", 8),
    )


def _bytes(text: str) -> float:
    match = re.fullmatch(r"\s*([\d.]+)\s*(\w+)\s*", text)
    if match is None or match[2] not in UNITS:
        raise UserError(f"memory is {text!r}, but should be a number and one of {', '.join(UNITS)}, such as 16GiB")
    return float(match[1]) * UNITS[match[2]]


def _size(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 86400:,.1f} days" if seconds >= 86400 else f"{seconds / 60:,.1f} minutes"
