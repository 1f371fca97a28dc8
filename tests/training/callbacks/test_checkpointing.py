"""LastCheckpoint saves the last step of a fit however it ends, and logs how to resume an interrupted one."""

import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import Timer

from lightning_dalle.cli import main
from lightning_dalle.data.datamodule import Batch
from lightning_dalle.training.lit_dvae import LitDVAE


def config(tiny_run: dict[str, Path], folder: Path, every: int) -> list[str]:
    values = yaml.safe_load(tiny_run["dvae"].read_text())
    values["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    values["trainer"]["callbacks"][-1] = {
        "class_path": "lightning_dalle.training.callbacks.checkpointing.LastCheckpoint",
        "init_args": {"every_n_train_steps": every},
    }
    folder.mkdir(exist_ok=True)
    (folder / "dvae.yaml").write_text(yaml.safe_dump(values))
    return ["fit", "--config", str(folder / "dvae.yaml"), "--trainer.limit_val_batches", "0"]


def test_the_last_step_is_saved_and_resumed_to_the_bit(tiny_run: dict[str, Path], tmp_path: Path) -> None:
    """Save every fourth step, stop at step 6 and resume to step 8; compare with eight unbroken steps."""
    states = []
    for name, stops in (("unbroken", [8]), ("broken", [6, 8])):
        fit = config(tiny_run, tmp_path / name, every=4)
        last = tmp_path / name / "dvae" / "checkpoints" / "last.ckpt"
        for stop in stops:
            more = ["--ckpt_path", str(last)] if last.exists() else []
            main([*fit, "--trainer.max_steps", str(stop), *more])
            state = torch.load(last, weights_only=True)
            assert state["global_step"] == stop
        assert [file.name for file in last.parent.iterdir()] == ["last.ckpt"]
        states.append(state)
    for key in ("state_dict", "current_model_state"):
        for name, value in states[0][key].items():
            assert torch.equal(value, states[1][key][name])


@pytest.mark.parametrize(
    ("every", "advice"),
    [
        (2, "resume from step 4 with --ckpt_path"),
        (7, "no checkpoint was saved; set every_n_train_steps, now 7, to a smaller"),
    ],
)
def test_an_interrupted_run_logs_how_to_resume(
    tiny_run: dict[str, Path],
    tmp_path: Path,
    every: int,
    advice: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = LitDVAE.training_step

    def interrupted(self: LitDVAE, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.global_step == 5:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LitDVAE, "training_step", interrupted)
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        main(config(tiny_run, tmp_path, every))
    assert f"the run was interrupted at step 5: {advice}" in caplog.text


ENDS: dict[str, tuple[list[str], int, int | None]] = {
    "max_epochs": (
        ["--trainer.max_steps", "-1", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "5"], 5, None),
    "max_time": (["--trainer.max_time", "01:00:00:00"], 4, None),
    "should_stop": ([], 4, None),
    "early_stopping": (
        ["--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "3",
         "--trainer.callbacks+", "pytorch_lightning.callbacks.EarlyStopping",
         "--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.stopping_threshold", "1e9"], 3, None),
    "ctrl_c": ([], 4, 130),
    "sigterm": ([], 4, 143),
}  # fmt: skip
"""Options of a fit that ends early, the step at which it ends, and the exit code, if any."""


@pytest.mark.parametrize("end", ENDS)
def test_a_fit_that_ends_in_any_way_keeps_its_model(
    tiny_run: dict[str, Path], tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the run resumed to step 8 with eight unbroken steps."""
    options, step, code = ENDS[end]
    unmodified = LitDVAE.training_step
    events = {
        "ctrl_c": lambda trainer: os.kill(os.getpid(), signal.SIGINT),
        "sigterm": lambda trainer: os.kill(os.getpid(), signal.SIGTERM),
        "should_stop": lambda trainer: setattr(trainer, "should_stop", True),
        "max_time": lambda trainer: monkeypatch.setattr(Timer, "time_elapsed", lambda *arguments: 1e9),
    }

    def ended_at_step_3(self: LitDVAE, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.global_step == 3 and end in events:
            events[end](self.trainer)
        return unmodified(self, batch, batch_idx)

    fit = config(tiny_run, tmp_path / "broken", every=100)
    last = tmp_path / "broken" / "dvae" / "checkpoints" / "last.ckpt"
    monkeypatch.setattr(LitDVAE, "training_step", ended_at_step_3)
    if code is None:
        main([*fit, *options])
    else:
        with pytest.raises(SystemExit) as ended:
            main(fit)
        assert ended.value.code == code
    monkeypatch.undo()
    assert torch.load(last, weights_only=True)["global_step"] == step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    limit = [option for option in options if end == "max_epochs"][-2:]
    main([*fit, *limit, "--trainer.max_steps", "8", "--ckpt_path", str(last)])
    main([*config(tiny_run, tmp_path / "unbroken", every=100), *limit, "--trainer.max_steps", "8"])
    states = [
        torch.load(tmp_path / run / last.relative_to(tmp_path / "broken"), weights_only=True)
        for run in ("broken", "unbroken")
    ]
    assert [state["global_step"] for state in states] == [8, 8]
    assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())
