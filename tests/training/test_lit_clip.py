"""Contrastive training: the batches of all processes are one, and the pairs found again are counted as they should."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.testing import assert_close

from lightning_dalle.cli import main
from lightning_dalle.evaluation.metrics import Retrieval
from lightning_dalle.models.clip import CLIPConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.lit_clip import LitCLIP

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
        "--model.learning_rate.warmup_steps", "0", "--model.stand_ins", "null", *more,
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


def test_it_learns_from_stand_ins(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    """The same steps on the real pictures alone end elsewhere."""
    folder = ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    main(["fit", "--config", str(tiny_run["clip"]), *folder, "--model.stand_ins", "null"])
    without, learned = (
        torch.load(run / "clip/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in (tmp_path, tiny_run["clip"].parent)
    )
    assert without.keys() == learned.keys(), "the dVAE is no part of the CLIP"
    assert not torch.equal(without["clip.network.visual.conv1.weight"], learned["clip.network.visual.conv1.weight"])


@pytest.mark.parametrize(("begun", "kept"), [(9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)])
def test_the_logit_scale_is_clamped_after_a_step(begun: float, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.LightningModule, "optimizer_step", lambda *args, **kwargs: None)
    config = CLIPConfig(image_size=16, patch_size=8, vision_width=16, vision_layers=1, text_width=16, text_layers=1,
                        head_width=8, embed_dim=8, text_len=8)  # fmt: skip
    module = LitCLIP(config, CosineAnneal(start=1e-3, end=1e-4, num_steps=4))
    with torch.no_grad():
        module.clip.network.logit_scale.fill_(begun)
    module.optimizer_step()
    assert float(module.clip.network.logit_scale) == pytest.approx(kept)
