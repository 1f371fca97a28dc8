"""What a run is made on, as reports tell it."""

import torch

from lightning_dalle.hardware import describe_hardware, has_native_bf16


def test_the_machine_is_described_by_what_it_is() -> None:
    described = describe_hardware()
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["native_bf16"] == has_native_bf16("cuda" if torch.cuda.is_available() else "cpu")
