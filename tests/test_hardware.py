"""Hardware: choice of the device, and the description that results record."""

import pytest
import torch

from lightning_dalle.errors import UserError
from lightning_dalle.hardware import describe_hardware, has_native_bf16, resolve_device


def test_the_description_is_that_of_torch() -> None:
    described = describe_hardware()
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["native_bf16"] == has_native_bf16("cuda" if torch.cuda.is_available() else "cpu")


def test_auto_is_the_gpu_if_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


def test_an_unusable_device_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot use device 'gpu' here \(.*\); choose another --device, such as cpu"):
        resolve_device("gpu")
