"""Contrastive training over the batches of all processes, and retrieval recall."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.testing import assert_close

from lightning_dalle.cli import main
from lightning_dalle.evaluation.metrics import RetrievalRecall
from lightning_dalle.models.clip import CLIPConfig
from lightning_dalle.schedules import CosineAnneal
from lightning_dalle.training.lit_clip import LitCLIP

ALL = ("image_to_text_r1", "image_to_text_r5", "text_to_image_r1", "text_to_image_r5")


def weights_after(config: Path, folder: Path, *more: str) -> dict[str, torch.Tensor]:
    """Return the weights after plain gradient descent, which depends linearly on the gradients."""
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
        "--model.learning_rate.warmup_steps", "0", "--model.reconstruction_augment", "null", *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "clip/checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.slow
def test_two_processes_learn_the_same_as_one_with_twice_the_batch_size(
    tiny_run: dict[str, Path], tmp_path: Path
) -> None:
    one = weights_after(tiny_run["clip"], tmp_path / "one", "--data.batch_size", "16")
    two = weights_after(
        tiny_run["clip"], tmp_path / "two", "--trainer.devices", "2", "--trainer.strategy", "ddp"
    )  # fmt: skip
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert_close(two[name], value, atol=1e-5, rtol=0)
    initial = math.log(1 / 0.07)  # open_clip's
    assert abs(float(one["clip.network.logit_scale"]) - initial) > 1e-4, "the loss did not change the scale"


def test_retrieval_recall_counts_matching_pairs() -> None:
    images = torch.eye(8)
    texts = images.roll(1, 0)
    recall = RetrievalRecall()
    recall.update(images[:3], images[:3])
    recall.update(images[3:], images[3:])
    assert recall.compute() == dict.fromkeys(ALL, 1)
    recall.reset()
    recall.update(images, texts)
    assert recall.compute()["image_to_text_r1"] == 0
    recall.reset()
    recall.update(torch.ones(8, 2), torch.ones(8, 2))
    assert recall.compute()["text_to_image_r5"] == 0, "ties count as misses"
    recall.reset()
    near = torch.eye(8) + 0.5 * torch.eye(8).roll(1, 0)
    recall.update(images, near)
    assert recall.compute()["image_to_text_r1"] == pytest.approx(1)


def test_reconstruction_augment_changes_training(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    folder = ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    main(["fit", "--config", str(tiny_run["clip"]), *folder, "--model.reconstruction_augment", "null"])
    without, learned = (
        torch.load(run / "clip/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in (tmp_path, tiny_run["clip"].parent)
    )
    assert without.keys() == learned.keys(), "the CLIP checkpoint must not contain the dVAE"
    assert not torch.equal(without["clip.network.visual.conv1.weight"], learned["clip.network.visual.conv1.weight"])


@pytest.mark.parametrize(("initial", "kept"), [(9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)])
def test_the_logit_scale_is_clamped_after_a_step(initial: float, kept: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl.LightningModule, "optimizer_step", lambda *args, **kwargs: None)
    config = CLIPConfig(image_size=16, patch_size=8, vision_width=16, vision_layers=1, text_width=16, text_layers=1,
                        head_width=8, embed_dim=8, text_len=8)  # fmt: skip
    module = LitCLIP(config, CosineAnneal(start=1e-3, end=1e-4, num_steps=4))
    with torch.no_grad():
        module.clip.network.logit_scale.fill_(initial)
    module.optimizer_step()
    assert float(module.clip.network.logit_scale) == pytest.approx(kept)
