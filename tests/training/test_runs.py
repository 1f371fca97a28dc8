"""Small real runs through the command line: resumed equals unbroken, killed goes on, TensorBoard shows what it must."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_dalle.cli import lightning, main

DVAE = """
trainer:
  accelerator: cpu
  max_steps: 12
  val_check_interval: 6
  check_val_every_n_epoch: null
  log_every_n_steps: 2
  num_sanity_val_steps: 0
  limit_val_batches: 2
  enable_progress_bar: false
  logger:
    class_path: pytorch_lightning.loggers.TensorBoardLogger
    init_args: {save_dir: SAVE_DIR, name: null, version: dvae}
  callbacks:
    - class_path: lightning_dalle.training.callbacks.Reconstructions
    - class_path: pytorch_lightning.callbacks.EMAWeightAveraging
      init_args: {decay: 0.5}
    - class_path: pytorch_lightning.callbacks.ModelCheckpoint
      init_args: {filename: last, every_n_train_steps: 1, enable_version_counter: false}
model:
  class_path: lightning_dalle.training.lit_dvae.LitDVAE
  init_args:
    config: {codebook_size: 32, n_group: 3, n_block: 1, n_hid: 8, n_init: 8, min_log_scale: 0.0}
    learning_rate: {start: 3.0e-3, end: 3.0e-4, num_steps: 12, warmup_steps: 2}
    temperature: {start: 1.0, end: 0.0625, num_steps: 12}
    kl_weight: {start: 0.0, end: 0.1, num_steps: 6}
    usage_bonus: 0.01
data:
  source: {class_path: lightning_dalle.data.openmoji.OpenMoji}
  image_size: 32
  batch_size: 8
  text_len: 24
  vocab_size: 512
"""

DALLE_MODEL = """
  class_path: lightning_dalle.training.lit_dalle.LitDALLE
  init_args:
    config: {n_layer: 3, n_head: 2, n_embd: 16}
    dvae_checkpoint: SAVE_DIR/dvae/checkpoints/last.ckpt
    learning_rate: {start: 3.0e-3, end: 3.0e-4, num_steps: 12, warmup_steps: 2}
    caption_dropout: 0.3
"""

SAMPLE_GRID = """
class_path: lightning_dalle.training.callbacks.SampleGrid
init_args: {prompts: [red apple, cat], num_samples: 2}
"""


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny configs of both stages, and a folder in which the dVAE is trained already."""
    folder = tmp_path_factory.mktemp("runs")
    dvae = yaml.safe_load(DVAE.replace("SAVE_DIR", str(folder)))
    dalle = yaml.safe_load(DVAE.replace("SAVE_DIR", str(folder)))
    dalle["model"] = yaml.safe_load(DALLE_MODEL.replace("SAVE_DIR", str(folder)))
    dalle["trainer"]["logger"]["init_args"]["version"] = "dalle"
    dalle["trainer"]["callbacks"][0] = yaml.safe_load(SAMPLE_GRID)
    files = {"dvae": folder / "dvae.yaml", "dalle": folder / "dalle.yaml"}
    files["dvae"].write_text(yaml.safe_dump(dvae))
    files["dalle"].write_text(yaml.safe_dump(dalle))
    main(["fit", "--config", str(files["dvae"])])
    main(["fit", "--config", str(files["dalle"])])
    return files


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


@pytest.mark.parametrize("stage", ["dvae", "dalle"])
def test_a_run_stopped_and_resumed_equals_an_unbroken_one_to_the_bit(
    configs: dict[str, Path], stage: str, tmp_path: Path
) -> None:
    """Stopped in the middle of an epoch and between two validations, with an EMA, BPE and caption dropout."""
    folder = "--trainer.logger.init_args.save_dir"
    first = ["fit", "--config", str(configs[stage]), folder, str(tmp_path)]
    # The epoch is cut short so that the run crosses into a second one, which the resumed run must begin alike.
    first += ["--trainer.limit_train_batches", "9", "--trainer.val_check_interval", "4"]
    last = tmp_path / stage / "checkpoints" / "last.ckpt"
    main(first)
    unbroken = load(last)
    last.unlink()
    main([*first, "--trainer.max_steps", "7"])
    assert load(last)["global_step"] == 7
    main([*first, "--ckpt_path", str(last)])
    resumed = load(last)
    assert resumed["global_step"] == unbroken["global_step"] == 12
    for key in ("state_dict", "current_model_state"):
        assert resumed[key].keys() == unbroken[key].keys()
        for name, value in unbroken[key].items():
            assert torch.equal(resumed[key][name], value), (key, name)


def tags(folder: Path) -> dict[str, list[str]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    found: dict[str, list[str]] = events.Tags()
    return found


def test_tensorboard_shows_the_dvae(configs: dict[str, Path]) -> None:
    found = tags(configs["dvae"].parent / "dvae")
    assert set(found["scalars"]) >= {
        "train/loss", "train/loss_pixels", "train/kl", "train/usage_entropy", "schedule/temperature",
        "schedule/kl_weight", "lr-AdamW/pg1", "val/loss", "val/loss_pixels", "val/kl", "val/psnr",
        "val/codebook_perplexity", "val/dead_codes", "train/samples_per_sec",
    }  # fmt: skip
    assert found["images"] == ["val/reconstructions"]
    assert found["histograms"] == ["val/codes"]


def test_tensorboard_shows_the_dalle(configs: dict[str, Path]) -> None:
    found = tags(configs["dvae"].parent / "dalle")
    assert set(found["scalars"]) >= {
        "train/loss", "train/loss_text", "train/loss_image", "train/bits_per_code", "lr-AdamW/pg1", "val/loss",
        "val/loss_text", "val/loss_image", "val/bits_per_code", "data/captions_cut", "train/samples_per_sec",
    }  # fmt: skip
    assert found["images"] == ["samples"]


def test_validate_test_and_predict_read_the_checkpoint(configs: dict[str, Path]) -> None:
    for stage, file in configs.items():
        checkpoint = str(file.parent / stage / "checkpoints" / "last.ckpt")
        for verb in ("validate", "test"):
            main([verb, "--config", str(file), "--ckpt_path", checkpoint])
    predicting = lightning(
        ["predict", "--config", str(configs["dvae"]), "--ckpt_path", str(configs["dvae"].parent / "dvae/checkpoints/last.ckpt"),
         "--return_predictions", "true", "--trainer.limit_predict_batches", "2"]
    )  # fmt: skip
    assert predicting.trainer.predict_loop.predictions[0].shape == (8, 8, 8)


def test_the_checkpoint_generates(configs: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = configs["dvae"].parent / "dalle/checkpoints/last.ckpt"
    main(["generate", "--checkpoint", str(checkpoint), "--prompts", '["red apple"]', "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*.png"))) == 5


def recipe(configs: dict[str, Path], folder: Path) -> list[str]:
    """A recipe of the tiny configs, slow enough in each stage to be killed in it."""
    stages = {
        "dvae": ["--config", str(configs["dvae"]), "--trainer.max_steps", "60"],
        "dalle": ["--config", str(configs["dalle"]), "--trainer.max_steps", "60",
                  "--model.dvae_checkpoint", "{run_dir}/dvae/checkpoints/last.ckpt"],
    }  # fmt: skip
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"run_dir": str(folder / "run"), "stages": stages, "prompts": 8}, sort_keys=False))
    return [sys.executable, "-m", "lightning_dalle", "reproduce", "--config", str(file)]


def test_reproduce_killed_in_each_stage_finishes_without_repeating(configs: dict[str, Path], tmp_path: Path) -> None:
    command, run = recipe(configs, tmp_path), tmp_path / "run"

    def start_and_kill_when(is_time: Any) -> None:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not is_time():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    start_and_kill_when(lambda: (run / "dvae/checkpoints/last.ckpt").exists())
    assert not (run / "dvae/finished.json").exists()
    step_when_killed = load(run / "dvae/checkpoints/last.ckpt")["global_step"]
    assert 1 <= step_when_killed < 60

    start_and_kill_when(lambda: (run / "dalle/checkpoints/last.ckpt").exists())
    dvae = (run / "dvae/checkpoints/last.ckpt").stat().st_mtime_ns
    assert load(run / "dvae/checkpoints/last.ckpt")["global_step"] == 60
    assert not (run / "report.json").exists()

    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "dvae: finished already" in done.stdout
    assert "dalle: going on from" in done.stdout
    assert (run / "dvae/checkpoints/last.ckpt").stat().st_mtime_ns == dvae
    assert load(run / "dalle/checkpoints/last.ckpt")["global_step"] == 60
    steps = [event.step for event in scalars(run / "dvae", "train/loss")]
    assert len([step for step in steps if step < step_when_killed - 4]) == len({s for s in steps if s < step_when_killed - 4})

    report = json.loads((run / "report.json").read_text())
    assert report["composition"]["right_emoji"]["of"] == 8
    assert (run / "samples.png").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "report: finished already" in again.stdout

    file = tmp_path / "recipe.yaml"
    file.write_text(file.read_text().replace("'60'", "'61'", 1))
    changed = subprocess.run(command, capture_output=True, text=True)
    assert changed.returncode == 2
    assert "finished with other settings" in changed.stderr


def scalars(folder: Path, tag: str) -> list[Any]:
    events = EventAccumulator(str(folder))
    events.Reload()
    found: list[Any] = events.Scalars(tag)
    return found
