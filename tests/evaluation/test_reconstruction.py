"""LPIPS of each reconstruction; AlexNet has random weights, since its own must be downloaded."""

from typing import Any

import pytest
import torch
import torchvision

from lightning_dalle.evaluation.reconstruction import _lpips


def test_lpips_has_one_value_for_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    alexnet = torchvision.models.alexnet
    monkeypatch.setattr(torchvision.models, "alexnet", lambda *args, **kwargs: alexnet(weights=None))
    lpips, reason = _lpips(torch.device("cpu"))
    assert lpips is not None
    assert reason is None
    images = torch.rand(3, 3, 64, 64)
    made: Any = torch.stack([images[0], images[1].flip(-1), torch.full_like(images[2], torch.nan)])
    values = lpips(made, images)
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert (values[1:] > 1e-3).all()
    assert lpips(made[1:2], images[1:2]).tolist() == pytest.approx([values[1].item()], rel=1e-4)
