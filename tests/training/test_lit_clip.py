"""Contrastive training: the batches of all processes are one, and the pairs found again are counted as they should."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lightning_dalle.evaluation.metrics import Retrieval

ALL = ("image_to_text_r1", "image_to_text_r5", "text_to_image_r1", "text_to_image_r5")


def weights_after(config: Path, folder: Path, *more: str) -> dict[str, torch.Tensor]:
    """Of plain gradient descent, which shows the gradients as they are, without averaging."""
    text = config.read_text()
    start = text.index("    - class_path: pytorch_lightning.callbacks.EMAWeightAveraging")
    end = text.index("    - class_path: pytorch_lightning.callbacks.ModelCheckpoint")
    folder.mkdir()
    file = folder / "clip.yaml"
    file.write_text(text[:start] + text[end:])
    command = [
        sys.executable, "-m", "lightning_dalle", "fit", "--config", str(file), "--trainer.max_steps", "3",
        "--trainer.logger.init_args.save_dir", str(folder), "--model.optimizer", "torch.optim.SGD",
        "--model.learning_rate.start", "0.05", "--model.learning_rate.end", "0.05",
        "--model.learning_rate.warmup_steps", "0", *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "clip/checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_two_processes_learn_what_one_learns_from_a_batch_of_twice_the_size(
    tiny_run: dict[str, Path], tmp_path: Path
) -> None:
    one = weights_after(tiny_run["clip"], tmp_path / "one", "--data.batch_size", "16")
    two = weights_after(
        tiny_run["clip"], tmp_path / "two", "--trainer.devices", "2", "--trainer.strategy", "ddp"
    )  # fmt: skip
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert_close(two[name], value, atol=1e-5, rtol=0)
    begun = math.log(1 / 0.07)  # open_clip's
    assert abs(float(one["clip.network.logit_scale"]) - begun) > 1e-4, "nothing was learnt"


def test_pairs_found_again() -> None:
    images = torch.eye(8)
    texts = images.roll(1, 0)
    found = Retrieval()
    found.update(images[:3], images[:3])
    found.update(images[3:], images[3:])
    assert found.compute() == dict.fromkeys(ALL, 1)
    found.reset()
    found.update(images, texts)
    assert found.compute()["image_to_text_r1"] == 0
    found.reset()
    found.update(torch.ones(8, 2), torch.ones(8, 2))
    assert found.compute()["text_to_image_r5"] == 0, "a model that gives all the same finds nothing"
    found.reset()
    near = torch.eye(8) + 0.5 * torch.eye(8).roll(1, 0)
    found.update(images, near)
    assert found.compute()["image_to_text_r1"] == pytest.approx(1)
