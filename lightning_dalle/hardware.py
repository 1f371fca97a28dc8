"""Choice of the device, native bf16 support, and a description of the hardware to store with results."""

import platform
from importlib.metadata import version
from typing import Any

import torch

from lightning_dalle.errors import UserError

PACKAGES = ("torchvision", "pytorch-lightning", "torch-fidelity", "datasets", "pillow", "simplejpeg")
"""Packages besides torch whose versions can change results and are stored with them."""


def resolve_device(name: str) -> torch.device:
    """Return the device called `name`: "cpu", "cuda", "cuda:1", ..., or "auto" for the GPU if there is one.

    Raises:
        UserError: if torch cannot use the device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot use device {name!r} here ({reason}); choose another --device, such as cpu") from error


def has_native_bf16(device: str) -> bool:
    """Return whether a device type ("cpu" or "cuda") has bf16 instructions; emulated bf16 is slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def describe_hardware() -> dict[str, Any]:
    """Return processor, number of CPU threads, GPU and package versions, to be stored with results."""
    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native_bf16": has_native_bf16("cuda" if torch.cuda.is_available() else "cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in PACKAGES},
    }
