"""bf16 on devices that compute it natively, fp32 on others, and gradient clipping in both."""

import pytest
import torch
from torch import nn

from lightning_dalle.training.precision import native_bf16
from lightning_dalle.training.precision.native_bf16 import NativeBF16


@pytest.mark.parametrize(("is_native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_autocasts_only_where_bf16_is_native(
    monkeypatch: pytest.MonkeyPatch, is_native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(native_bf16, "has_native_bf16", lambda device: is_native)
    plugin = NativeBF16()
    layer, _, _ = plugin.connect(nn.Linear(4, 4), [], [])
    with plugin.forward_context():
        assert layer(torch.ones(1, 4)).dtype == dtype


def test_native_bf16_depends_on_the_model_s_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(native_bf16, "has_native_bf16", lambda device: bool(asked.append(device)))
    NativeBF16().connect(nn.Linear(4, 4, device="meta"), [], [])
    assert asked == ["meta"]


def test_clips_gradients_of_a_fused_optimizer() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 10.0)
    NativeBF16().clip_gradients(torch.optim.AdamW([parameter], fused=True), 1.0)
    assert parameter.grad.norm() == pytest.approx(1.0, rel=1e-4)
