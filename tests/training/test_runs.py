"""Small runs from the command line: resuming, killing, TensorBoard, and old checkpoints."""

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
from pytorch_lightning.cli import LightningCLI
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_dalle.cli import main
from lightning_dalle.commands.reproduce import run_stage
from lightning_dalle.errors import UserError
from lightning_dalle.lightning_cli import run_lightning


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


@pytest.mark.parametrize("stage", ["dvae", "dalle", "clip"])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tiny_run: dict[str, Path], stage: str, tmp_path: Path) -> None:
    """Stop in the middle of an epoch and between two validations, with EMA, BPE dropout and caption dropout."""
    folder = "--trainer.logger.init_args.save_dir"
    first = ["fit", "--config", str(tiny_run[stage]), folder, str(tmp_path)]
    # Short epochs make the run enter a second one, which the resumed run must start in the same way.
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


def test_halve_on_plateau_resumes_its_state(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    """Use such a small learning rate that no validation improves on the first."""
    config = yaml.safe_load(tiny_run["dalle"].read_text())
    config["model"]["init_args"]["learning_rate"] = {"peak": 1e-9, "warmup_steps": 2, "patience": 1}
    config["trainer"].update(val_check_interval=4, limit_train_batches=9, max_steps=16)
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    (tmp_path / "by_steps.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        UserError,
        match="checkpoints after validations, but every_n_train_steps=1 of ModelCheckpoint saves before them; remove",
    ):
        run_lightning(["fit", "--config", str(tmp_path / "by_steps.yaml")])
    del config["trainer"]["callbacks"][-1]["init_args"]["every_n_train_steps"]
    (tmp_path / "plateau.yaml").write_text(yaml.safe_dump(config))
    fit = ["fit", "--config", str(tmp_path / "plateau.yaml")]
    last = tmp_path / "dalle" / "checkpoints" / "last.ckpt"
    main(fit)
    unbroken = load(last)
    last.unlink()
    main([*fit, "--trainer.max_steps", "8"])
    assert load(last)["plateau"]["num_reductions"] == 1
    main([*fit, "--ckpt_path", str(last)])
    resumed = load(last)
    assert resumed["plateau"] == unbroken["plateau"]
    assert resumed["plateau"]["num_reductions"] == 3
    assert resumed["lr_schedulers"] == unbroken["lr_schedulers"]
    assert resumed["lr_schedulers"][0]["_last_lr"][1] == pytest.approx(
        1e-9 / 4
    )  # the fourth validation acts on the next step
    assert resumed["global_step"] == unbroken["global_step"] == 16
    for name, value in unbroken["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name


def test_two_processes_finish_an_epoch_with_a_progress_bar(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    """Use a progress bar, which reads epoch metrics on rank 0 only and could deadlock with the other rank."""
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
        "train/loss", "train/loss_pixels", "train/kl", "train/codebook_entropy", "schedule/temperature",
        "schedule/kl_weight", "lr-AdamW/pg1", "val/loss", "val/loss_pixels", "val/kl", "val/psnr",
        "val/codebook_perplexity", "val/dead_codes", "train/device/samples_per_sec",
    }  # fmt: skip
    assert set(found["images"]) == {"data/batch", "val/reconstructions"}
    assert set(found["histograms"]) == {"data/caption_tokens", "val/codes"}


def test_tensorboard_shows_the_dalle(tiny_run: dict[str, Path]) -> None:
    found = tags(tiny_run["dvae"].parent / "dalle")
    assert set(found["scalars"]) >= {
        "train/loss", "train/loss_text", "train/loss_image", "train/bits_per_code", "lr-MuonAdamW/pg1", "val/loss",
        "val/loss_text", "val/loss_image", "val/bits_per_code", "data/captions_truncated",
        "train/device/samples_per_sec",
    }  # fmt: skip
    assert set(found["images"]) == {"data/batch", "samples"}


def test_tensorboard_shows_the_clip(tiny_run: dict[str, Path]) -> None:
    found = tags(tiny_run["clip"].parent / "clip")
    assert set(found["scalars"]) >= {
        "train/loss", "train/logit_scale", "lr-AdamW/pg1", "val/image_to_text_r1", "val/image_to_text_r5",
        "val/text_to_image_r1", "val/text_to_image_r5", "train/device/samples_per_sec",
    }  # fmt: skip


def test_validate_and_test_read_the_checkpoint_and_predict_needs_a_writer(tiny_run: dict[str, Path]) -> None:
    for stage, file in tiny_run.items():
        checkpoint = str(file.parent / stage / "checkpoints" / "last.ckpt")
        for subcommand in ("validate", "test"):
            main([subcommand, "--config", str(file), "--ckpt_path", checkpoint])
        with pytest.raises(UserError, match=r"nothing would write what predict computes with a Lit.*: add CodesWriter"):
            run_lightning(["predict", "--config", str(file), "--ckpt_path", checkpoint])


@pytest.mark.parametrize("stage", ["dvae", "dalle", "clip"])
def test_a_checkpoint_of_format_1_is_tested_but_not_resumed(
    tiny_run: dict[str, Path], stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Strip the format version, which checkpoints of format 1 lack."""
    old = tmp_path / "old.ckpt"
    checkpoint = load(tiny_run[stage].parent / stage / "checkpoints" / "last.ckpt")
    assert checkpoint.pop("format_version") == 2
    torch.save(checkpoint, old)
    for subcommand in ("validate", "test"):
        main([subcommand, "--config", str(tiny_run[stage]), "--ckpt_path", str(old)])
    if stage == "dalle":
        out = str(tmp_path / "out")
        main(["generate", "--checkpoint", str(old), "--prompts", "red apple", "--num_candidates", "1", "--out", out])
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tiny_run[stage]), "--ckpt_path", str(old)])
    error = " ".join(capsys.readouterr().err.split())
    assert f"cannot resume from {old}: it has checkpoint format 1" in error
    assert "this version resumes format 2; use it with generate/test/export" in error


@pytest.mark.parametrize("stage", ["dvae", "dalle", "clip"])
def test_the_trainer_does_not_resume_a_checkpoint_of_format_1(
    tiny_run: dict[str, Path], stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resume with `Trainer.fit`, which does not read the checkpoint before the data is prepared."""
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    save_dir = ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    cli = run_lightning(["fit", "--config", str(tiny_run[stage]), *save_dir])
    checkpoint = load(tiny_run[stage].parent / stage / "checkpoints" / "last.ckpt")
    del checkpoint["format_version"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"cannot resume from .*old\.ckpt: it has checkpoint format 1"):
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=tmp_path / "old.ckpt")


def test_the_checkpoint_generates(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = tiny_run["dvae"].parent / "dalle/checkpoints/last.ckpt"
    main(["generate", "--checkpoint", str(checkpoint), "--prompts", '["red apple"]', "--out", str(tmp_path / "out")])
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    assert (tmp_path / "out.png").is_file()


def recipe(tiny_run: dict[str, Path], folder: Path) -> list[str]:
    """Write a recipe of the tiny configs, with stages long enough to be killed; return its command."""
    stages = {
        "dvae": ["--config", str(tiny_run["dvae"]), "--trainer.max_steps", "60"],
        "dalle": ["--config", str(tiny_run["dalle"]), "--trainer.max_steps", "60",
                  "--model.dvae_checkpoint", "{run_dir}/dvae/checkpoints/last.ckpt"],
        "clip": ["--config", str(tiny_run["clip"]), "--trainer.max_steps", "60",
                 "--model.reconstruction_augment.dvae_checkpoint", "{run_dir}/dvae/checkpoints/last.ckpt"],
    }  # fmt: skip
    settings = {"run_dir": str(folder / "run"), "stages": stages}
    settings["protocol"] = yaml.safe_load(Path("configs/protocols/openmoji.yaml").read_text())
    settings["protocol"]["generation"]["captions"]["count"] = 8
    settings["reranking"] = {"prompts": 4, "candidates": [1, 3]}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return [sys.executable, "-m", "lightning_dalle", "reproduce", "--config", str(file)]


def fid_of_test(run: Path, recipe_file: str) -> float:
    """Return the FID of the recipe's DALL-E under the recipe's protocol, measured by `test` instead of `reproduce`."""
    config = yaml.safe_load(Path("configs/openmoji/eval.yaml").read_text())
    arguments = config["trainer"]["callbacks"][0]["init_args"]
    arguments |= {"protocol": yaml.safe_load(Path(recipe_file).read_text())["protocol"]}
    arguments |= {f"{kind}_dir": str(run / "test" / kind) for kind in ("samples", "results", "cache")}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(run / "test")
    file = run / "eval.yaml"
    file.write_text(yaml.safe_dump(config))
    main(["test", "--config", str(file), "--ckpt_path", str(run / "dalle/checkpoints/last.ckpt")])
    (result,) = (run / "test" / "results").glob("*.json")
    return json.loads(result.read_text())["by_candidates"]["1"]["by_blur_radius"]["0"]["fid"]["value"]


@pytest.mark.slow
def test_reproduce_killed_in_each_stage_resumes_without_repeating_finished_stages(
    tiny_run: dict[str, Path], tmp_path: Path, weights_if_any: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    command, run = recipe(tiny_run, tmp_path), tmp_path / "run"
    if weights_if_any is not None:
        monkeypatch.setenv("LIGHTNING_DALLE_INCEPTION", str(weights_if_any))

    def start_and_kill_when(is_time: Any) -> None:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not is_time():
            assert process.poll() is None, "the process ended before it was killed"
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
    assert "dvae: already finished" in done.stdout
    assert "dalle: already finished" in done.stdout
    assert (run / "dvae/checkpoints/last.ckpt").stat().st_mtime_ns == dvae
    assert load(run / "dalle/checkpoints/last.ckpt")["global_step"] == 60
    assert "clip: already finished" in done.stdout
    finished = {stage: json.loads((run / stage / "finished.json").read_text()) for stage in ("dvae", "dalle", "clip")}
    assert all(record["resumed"] for record in finished.values())
    assert finished["dalle"]["after"] == finished["clip"]["after"] == finished["dvae"]["checkpoint"]
    resumed = max((run / "dvae").glob("events.*"), key=lambda file: file.stat().st_mtime_ns)
    assert min(event.step for event in scalars(resumed, "train/loss")) >= step_when_killed - 1

    report = json.loads((run / "report.json").read_text())
    assert report["format"] == 2
    assert report["reconstruction"]["dvae"]["compositions"]["right_emoji"]["of"] == 312
    assert report["composition"]["right_emoji"]["of"] == 8
    assert len(list((run / "samples").glob("*.png"))) == 8
    fidelity = report["composition"]["fidelity"]
    assert (fidelity is None) == (weights_if_any is None)
    if fidelity is not None:
        assert fidelity["images"] == {"generated": 8, "reference": 8}
        assert fidelity["fid"]["value"] == fid_of_test(run, command[-1])
    assert (run / "samples.png").exists()
    reranked = report["composition"]["reranked"]
    assert {size: measured["right_emoji"]["of"] for size, measured in reranked["by_candidates"].items()} == {
        "1": 4, "3": 4,
    }  # fmt: skip
    assert report["clip"]["image_to_text_r1"]["of"] == 200
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "report: already finished" in again.stdout

    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text().replace("'60'", "'61'", 1))
    changed = subprocess.run(command, capture_output=True, text=True)
    assert changed.returncode == 2
    assert f"cannot resume the stage dvae in {run}: it was started with other settings" in changed.stderr
    assert "the recipe has now (different: its arguments of fit); choose another --run_dir, or" in changed.stderr

    # The settings of a stage include the hash of its dVAE; its finished.json includes the hash of its checkpoint.
    settings = json.loads((run / "dalle/finished.json").read_text())
    with pytest.raises(UserError, match=r"settings than the recipe has now \(different: its dVAE\); choose another"):
        run_stage("dalle", settings["fit"], run, "another dVAE")
    (run / "dalle/started.json").rename(run / "dalle/elsewhere.json")
    (run / "dalle/finished.json").rename(run / "dalle/elsewhere_too.json")
    with pytest.raises(UserError, match=r"last\.ckpt was not made by this recipe; choose another --run_dir"):
        run_stage("dalle", settings["fit"], run, settings["after"])
    (run / "dalle/elsewhere.json").rename(run / "dalle/started.json")
    (run / "dalle/elsewhere_too.json").rename(run / "dalle/finished.json")
    (run / "dalle/checkpoints/last.ckpt").write_bytes(b"overwritten")
    with pytest.raises(UserError, match=r"last\.ckpt is missing or is not the checkpoint that .* records; delete"):
        run_stage("dalle", settings["fit"], run, settings["after"])


def test_a_dalle_checkpoint_contains_the_dvae_it_was_trained_with(tiny_run: dict[str, Path]) -> None:
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
