"""LastCheckpoint saves the last step of a fit and logs how to resume an interrupted one."""

from pathlib import Path

import pytest
import torch
import yaml

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
