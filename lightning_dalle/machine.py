"""What a run is made on: processor, GPU and versions, and whether bf16 is fast there.

Knows hardware. Knows nothing of models or training.
"""

import platform
from importlib.metadata import version
from typing import Any

import torch

MEASURING = ("torchvision", "pytorch-lightning", "torch-fidelity", "datasets", "pillow", "simplejpeg")
"""Packages beside torch that figures depend on."""


def has_native_bf16(device: str) -> bool:
    """Whether a device ("cpu" or "cuda") multiplies bf16 itself rather than by emulation, which is slower than fp32."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def describe() -> dict[str, Any]:
    """What stands beside numbers in a report."""
    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native_bf16": has_native_bf16("cuda" if torch.cuda.is_available() else "cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in MEASURING},
    }
