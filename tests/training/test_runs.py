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
from lightning_dalle.commands.reproduce import run_stage
from lightning_dalle.errors import UserError


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


@pytest.mark.parametrize("stage", ["dvae", "dalle", "clip"])
def test_a_run_stopped_and_resumed_equals_an_unbroken_one_to_the_bit(
    tiny_run: dict[str, Path], stage: str, tmp_path: Path
) -> None:
    """Stopped in the middle of an epoch and between two validations, with an EMA, BPE and caption dropout."""
    folder = "--trainer.logger.init_args.save_dir"
    first = ["fit", "--config", str(tiny_run[stage]), folder, str(tmp_path)]
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
    assert resumed["lr_schedulers"] == unbroken["lr_schedulers"]
    for index, state in unbroken["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(resumed["optimizer_states"][0]["state"][index][name], value)
    for key in ("state_dict", "current_model_state"):
        assert resumed[key].keys() == unbroken[key].keys()
        for name, value in unbroken[key].items():
            assert torch.equal(resumed[key][name], value), (key, name)


def test_a_rate_that_is_halved_on_plateaus_goes_on_where_it_was(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    """So small a rate that nothing is learned: no validation is better than the first. Each is followed by a save."""
    config = yaml.safe_load(tiny_run["dalle"].read_text())
    config["model"]["init_args"]["learning_rate"] = {"peak": 1e-9, "warmup_steps": 2, "patience": 1}
    config["trainer"].update(val_check_interval=4, limit_train_batches=9, max_steps=16)
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    (tmp_path / "by_steps.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="saved after validations, but every_n_train_steps=1 of ModelCheckpoint saves"):
        lightning(["fit", "--config", str(tmp_path / "by_steps.yaml")])
    del config["trainer"]["callbacks"][-1]["init_args"]["every_n_train_steps"]
    (tmp_path / "plateau.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config", str(tmp_path / "plateau.yaml")]
    last = tmp_path / "dalle" / "checkpoints" / "last.ckpt"
    main(fit)
    unbroken = load(last)
    last.unlink()
    main([*fit, "--trainer.max_steps", "8"])
    assert load(last)["plateau"]["halved"] == 1
    main([*fit, "--ckpt_path", str(last)])
    resumed = load(last)
    assert resumed["plateau"] == unbroken["plateau"]
    assert resumed["plateau"]["halved"] == 3
    assert resumed["lr_schedulers"] == unbroken["lr_schedulers"]
    assert resumed["lr_schedulers"][0]["_last_lr"][1] == pytest.approx(1e-9 / 4)  # the fourth validation is yet to act
    assert resumed["global_step"] == unbroken["global_step"] == 16
    for name, value in unbroken["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name


def test_two_processes_get_over_an_epoch_s_end(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    """The bar of the first one asks for the epoch's sums there, as no other does."""
    command = [sys.executable, "-m", "lightning_dalle", "fit", "--config", str(tiny_run["dalle"]), "--trainer.devices",
               "2", "--trainer.strategy", "ddp", "--trainer.limit_train_batches", "2", "--trainer.max_steps", "4",
               "--trainer.enable_progress_bar", "true", "--trainer.callbacks+", "RichProgressBar",
               "--trainer.logger.init_args.save_dir", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "dalle" / "checkpoints" / "last.ckpt")["global_step"] == 4


def tags(folder: Path) -> dict[str, list[str]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    found: dict[str, list[str]] = events.Tags()
    return found


def test_tensorboard_shows_the_dvae(tiny_run: dict[str, Path]) -> None:
    found = tags(tiny_run["dvae"].parent / "dvae")
    assert set(found["scalars"]) >= {
        "train/loss", "train/loss_pixels", "train/kl", "train/usage_entropy", "schedule/temperature",
        "schedule/kl_weight", "lr-AdamW/pg1", "val/loss", "val/loss_pixels", "val/kl", "val/psnr",
        "val/codebook_perplexity", "val/dead_codes", "train/device/samples_per_sec",
    }  # fmt: skip
    assert set(found["images"]) == {"data/batch", "val/reconstructions"}
    assert set(found["histograms"]) == {"data/caption_tokens", "val/codes"}


def test_tensorboard_shows_the_dalle(tiny_run: dict[str, Path]) -> None:
    found = tags(tiny_run["dvae"].parent / "dalle")
    assert set(found["scalars"]) >= {
        "train/loss", "train/loss_text", "train/loss_image", "train/bits_per_code", "lr-MuonAdamW/pg1", "val/loss",
        "val/loss_text", "val/loss_image", "val/bits_per_code", "data/captions_cut", "train/device/samples_per_sec",
    }  # fmt: skip
    assert set(found["images"]) == {"data/batch", "samples"}


def test_tensorboard_shows_the_clip(tiny_run: dict[str, Path]) -> None:
    found = tags(tiny_run["clip"].parent / "clip")
    assert set(found["scalars"]) >= {
        "train/loss", "train/logit_scale", "lr-AdamW/pg1", "val/image_to_text_r1", "val/image_to_text_r5",
        "val/text_to_image_r1", "val/text_to_image_r5", "train/device/samples_per_sec",
    }  # fmt: skip


def test_validate_test_and_predict_read_the_checkpoint(tiny_run: dict[str, Path]) -> None:
    for stage, file in tiny_run.items():
        checkpoint = str(file.parent / stage / "checkpoints" / "last.ckpt")
        for verb in ("validate", "test"):
            main([verb, "--config", str(file), "--ckpt_path", checkpoint])
    checkpoint = str(tiny_run["dvae"].parent / "dvae/checkpoints/last.ckpt")
    predicting = lightning(
        ["predict", "--config", str(tiny_run["dvae"]), "--ckpt_path", checkpoint,
         "--return_predictions", "true", "--trainer.limit_predict_batches", "2"]
    )  # fmt: skip
    assert predicting.trainer.predict_loop.predictions[0].shape == (8, 8, 8)
    for stage in ("dalle", "clip"):
        checkpoint = str(tiny_run[stage].parent / stage / "checkpoints/last.ckpt")
        with pytest.raises(UserError, match="predict writes the codes of a dVAE, but the model is a Lit"):
            lightning(["predict", "--config", str(tiny_run[stage]), "--ckpt_path", checkpoint])


def test_the_checkpoint_generates(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = tiny_run["dvae"].parent / "dalle/checkpoints/last.ckpt"
    main(["generate", "--checkpoint", str(checkpoint), "--prompts", '["red apple"]', "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    assert (tmp_path / "out.png").is_file()


def recipe(tiny_run: dict[str, Path], folder: Path) -> list[str]:
    """A recipe of the tiny configs, slow enough in each stage to be killed in it."""
    stages = {
        "dvae": ["--config", str(tiny_run["dvae"]), "--trainer.max_steps", "60"],
        "dalle": ["--config", str(tiny_run["dalle"]), "--trainer.max_steps", "60",
                  "--model.dvae_checkpoint", "{run_dir}/dvae/checkpoints/last.ckpt"],
        "clip": ["--config", str(tiny_run["clip"]), "--trainer.max_steps", "60",
                 "--model.stand_ins.dvae_checkpoint", "{run_dir}/dvae/checkpoints/last.ckpt"],
    }  # fmt: skip
    settings = {"run_dir": str(folder / "run"), "stages": stages, "prompts": 8}
    settings["reranking"] = {"prompts": 4, "candidates": [1, 3]}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return [sys.executable, "-m", "lightning_dalle", "reproduce", "--config", str(file)]


def test_reproduce_killed_in_each_stage_finishes_without_repeating(
    tiny_run: dict[str, Path], tmp_path: Path, weights_if_any: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, run = recipe(tiny_run, tmp_path), tmp_path / "run"
    if weights_if_any is not None:
        monkeypatch.setenv("LIGHTNING_DALLE_INCEPTION", str(weights_if_any))

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

    start_and_kill_when(lambda: (run / "clip/checkpoints/last.ckpt").exists())
    start_and_kill_when(lambda: (run / "clip/finished.json").exists())  # while the report is made
    assert not (run / "report.json").exists()

    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "dvae: finished already" in done.stdout
    assert "dalle: finished already" in done.stdout
    assert (run / "dvae/checkpoints/last.ckpt").stat().st_mtime_ns == dvae
    assert load(run / "dalle/checkpoints/last.ckpt")["global_step"] == 60
    assert "clip: finished already" in done.stdout
    finished = {stage: json.loads((run / stage / "finished.json").read_text()) for stage in ("dvae", "dalle", "clip")}
    assert all(record["resumed"] for record in finished.values())
    assert finished["dalle"]["after"] == finished["clip"]["after"] == finished["dvae"]["checkpoint"]
    resumed = max((run / "dvae").glob("events.*"), key=lambda file: file.stat().st_mtime_ns)
    assert min(event.step for event in scalars(resumed, "train/loss")) >= step_when_killed - 1

    report = json.loads((run / "report.json").read_text())
    assert report["reconstruction"]["dvae"]["compositions"]["right_emoji"]["of"] == 312
    assert report["composition"]["right_emoji"]["of"] == 8
    assert len(list((run / "samples").glob("*.png"))) == 8
    fidelity = report["composition"]["fidelity"]
    assert (fidelity is None) == (weights_if_any is None)
    if fidelity is not None:
        assert fidelity["images"] == {"generated": 8, "reference": 8}
    assert (run / "samples.png").exists()
    reranked = report["composition"]["reranked"]
    assert {size: measured["right_emoji"]["of"] for size, measured in reranked["by_candidates"].items()} == {
        "1": 4, "3": 4,
    }  # fmt: skip
    assert report["clip"]["image_to_text_r1"]["of"] == 200
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "report: finished already" in again.stdout

    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace("'60'", "'61'", 1))
    changed = subprocess.run(command, capture_output=True, text=True)
    assert changed.returncode == 2
    assert "the stage dvae in" in changed.stderr
    assert "begun with other settings than the recipe has now (fit)" in changed.stderr

    # What a stage was built from is part of its settings, and a finished stage is the checkpoint that it left.
    settings = json.loads((run / "dalle/finished.json").read_text())
    with pytest.raises(UserError, match=r"other settings than the recipe has now \(after\)"):
        run_stage("dalle", settings["fit"], run, "another dVAE")
    (run / "dalle/started.json").rename(run / "dalle/elsewhere.json")
    (run / "dalle/finished.json").rename(run / "dalle/elsewhere_too.json")
    with pytest.raises(UserError, match="made by something else than this recipe"):
        run_stage("dalle", settings["fit"], run, settings["after"])
    (run / "dalle/elsewhere.json").rename(run / "dalle/started.json")
    (run / "dalle/elsewhere_too.json").rename(run / "dalle/finished.json")
    (run / "dalle/checkpoints/last.ckpt").write_bytes(b"overwritten")
    with pytest.raises(UserError, match="tells of another checkpoint"):
        run_stage("dalle", settings["fit"], run, settings["after"])


def test_the_dvae_in_a_dalle_checkpoint_is_the_one_it_was_trained_on(tiny_run: dict[str, Path]) -> None:
    folder = tiny_run["dvae"].parent
    dvae, dalle = (load(folder / stage / "checkpoints/last.ckpt")["state_dict"] for stage in ("dvae", "dalle"))
    weights = {name: value for name, value in dvae.items() if name.startswith("dvae.")}
    assert weights
    for name, value in weights.items():
        assert torch.equal(dalle[name], value), name


def scalars(folder: Path, tag: str) -> list[Any]:
    events = EventAccumulator(str(folder))
    events.Reload()
    found: list[Any] = events.Scalars(tag)
    return found
