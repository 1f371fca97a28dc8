"""Reconstruction quality of our dVAE and the peer's after three minutes of training from scratch on OpenMoji.

    python -m benchmarks.dvae_quality

Each dVAE trains for the number of steps that it takes in three minutes, at its own rate, measured just before. Ours is
the quickstart's, trained by `fit` with schedules scaled to those steps; the peer's is that of `benchmarks.quality`.
The benchmark takes seven minutes on two quiet cores, prints PSNR and retrieval on the split val, and appends them to
benchmarks/results/dvae_quality.jsonl.
"""

import math
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.callbacks import Timer

from benchmarks import peer
from benchmarks.peer_training import VAE, steps_per_second, train, vae_training
from benchmarks.recording import RESULTS, record, run
from lightning_dalle.checkpoints import load_dvae
from lightning_dalle.evaluation.openmoji import Emoji, measure_dvae
from lightning_dalle.lightning_cli import run_lightning
from lightning_dalle.models.dvae import DVAE

MINUTES, CALIBRATION_STEPS = 3.0, 500
CONFIG = Path(__file__).parents[1] / "configs" / "openmoji" / "quickstart_dvae.yaml"


def scaled(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return a recipe's config for another number of steps, with the warm-up scaled to the same fraction of the run."""
    trainer = config["trainer"]
    learning_rate = config["model"]["init_args"]["learning_rate"]
    learning_rate["warmup_steps"] = math.ceil(learning_rate["warmup_steps"] * steps / trainer["max_steps"])
    trainer |= {"max_steps": steps, "val_check_interval": steps}
    return config


def our_training(steps: int, folder: Path) -> tuple[DVAE, float]:
    """Train the quickstart's dVAE for a number of steps; return it and the seconds from the first step on."""
    config = scaled(yaml.safe_load(CONFIG.read_text()), steps)
    trainer = config["trainer"]
    trainer["logger"]["init_args"]["save_dir"] = str(folder)
    averaging = [callback for callback in trainer["callbacks"] if callback["class_path"].endswith("WeightAveraging")]
    checkpoint = {"dirpath": str(folder), "filename": str(steps), "every_n_train_steps": steps}
    trainer["callbacks"] = [
        *averaging,
        {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": checkpoint},
        {"class_path": "pytorch_lightning.callbacks.Timer", "init_args": {"interval": "step"}},
    ]
    file = folder / f"{steps}.yaml"
    file.write_text(yaml.safe_dump(config))
    fitted = run_lightning(["fit", "--config", str(file)])
    (timer,) = (callback for callback in fitted.trainer.callbacks if isinstance(callback, Timer))  # type: ignore[attr-defined]
    return load_dvae(folder / f"{steps}.ckpt"), timer.time_elapsed("train")


def main(minutes: float = MINUTES, calibration_steps: int = CALIBRATION_STEPS, results: Path = RESULTS) -> None:
    """Train and measure both dVAEs.

    Args:
        minutes: training time of each.
        calibration_steps: steps that our rate is measured over; the peer's takes a fifth of them.
        results: folder of the recorded results.
    """
    with tempfile.TemporaryDirectory() as folder:
        _, seconds = our_training(calibration_steps, Path(folder))
        ours: dict[str, Any] = {"steps": round(60 * minutes * calibration_steps / seconds)}
        dvae, ours["seconds"] = our_training(ours["steps"], Path(folder))
    emoji = Emoji(32)  # after the fit, since threads that torch starts before it do not flush denormals
    vae, step = vae_training(emoji.images[emoji.indices("train")])
    peers: dict[str, Any] = {"steps": round(60 * minutes * steps_per_second(step, calibration_steps // 5))}
    vae, step = vae_training(emoji.images[emoji.indices("train")])
    begun = time.perf_counter()
    train(step, peers["steps"])
    peers["seconds"] = time.perf_counter() - begun
    result = {
        "lightning_dalle": {**ours, **measure_dvae(dvae, emoji)["dvae"]},
        "dalle-pytorch": {**peers, **measure_dvae(peer.PeersDVAE(vae.eval()), emoji)["dvae"]},
        "minutes": minutes,
        "peer_settings": VAE,
        "peer_versions": peer.PACKAGES,
    }
    record("dvae_quality", result, results)


if __name__ == "__main__":
    run(main)
