"""How well a dVAE reconstructs after three minutes: ours beside the peer's, both from scratch on OpenMoji.

    python -m benchmarks.dvae_quality

Each is trained for the steps that it takes in three minutes, by its own rate, which is measured just before. Ours is
the quickstart's, through `fit`, its schedules scaled to those steps; the peer's is as in `benchmarks.quality`. Seven
minutes in all on two quiet cores. Prints PSNR and retrieval of the split val, and appends them to
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
from benchmarks.recording import RESULTS, record
from lightning_dalle.checkpoints import load_dvae
from lightning_dalle.cli import lightning
from lightning_dalle.evaluation.openmoji import Emoji, measure_dvae
from lightning_dalle.models.dvae import DVAE

MINUTES, CALIBRATION_STEPS = 3.0, 500
CONFIG = Path(__file__).parents[1] / "configs" / "openmoji" / "quickstart_dvae.yaml"


def scaled(config: dict[str, Any], steps: int) -> dict[str, Any]:
    """A recipe's config for another number of steps; its warm-up is the same share of the run, as its schedules are."""
    trainer = config["trainer"]
    learning_rate = config["model"]["init_args"]["learning_rate"]
    learning_rate["warmup_steps"] = math.ceil(learning_rate["warmup_steps"] * steps / trainer["max_steps"])
    trainer |= {"max_steps": steps, "val_check_interval": steps}
    return config


def our_training(steps: int, folder: Path) -> tuple[DVAE, float]:
    """The quickstart's dVAE after another number of steps, and the seconds from its first step on."""
    config = scaled(yaml.safe_load(CONFIG.read_text()), steps)
    trainer = config["trainer"]
    trainer["logger"]["init_args"]["save_dir"] = str(folder)
    averaging = [one for one in trainer["callbacks"] if one["class_path"].endswith("WeightAveraging")]
    checkpoint = {"dirpath": str(folder), "filename": str(steps), "every_n_train_steps": steps}
    trainer["callbacks"] = [
        *averaging,
        {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": checkpoint},
        {"class_path": "pytorch_lightning.callbacks.Timer", "init_args": {"interval": "step"}},
    ]
    file = folder / f"{steps}.yaml"
    file.write_text(yaml.safe_dump(config))
    fitted = lightning(["fit", "--config", str(file)])
    (timer,) = (one for one in fitted.trainer.callbacks if isinstance(one, Timer))  # type: ignore[attr-defined]
    return load_dvae(folder / f"{steps}.ckpt"), timer.time_elapsed("train")


def main(minutes: float = MINUTES, calibration_steps: int = CALIBRATION_STEPS, results: Path = RESULTS) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, seconds = our_training(calibration_steps, Path(folder))
        ours: dict[str, Any] = {"steps": round(60 * minutes * calibration_steps / seconds)}
        dvae, ours["seconds"] = our_training(ours["steps"], Path(folder))
    emoji = Emoji(32)  # not before: threads that torch starts ahead of a fit do not take denormals for zeros
    vae, step = vae_training(emoji.images[emoji.of("train")])
    peers: dict[str, Any] = {"steps": round(60 * minutes * steps_per_second(step, calibration_steps // 5))}
    vae, step = vae_training(emoji.images[emoji.of("train")])
    begun = time.perf_counter()
    train(step, peers["steps"])
    peers["seconds"] = time.perf_counter() - begun
    result = {
        "lightning_dalle": {**ours, **measure_dvae(dvae, emoji)["dvae"]},
        "dalle-pytorch": {**peers, **measure_dvae(peer.PeersDVAE(vae.eval()), emoji)["dvae"]},
        "minutes": minutes,
        "settings_of_the_peer": VAE,
        "versions_of_the_peer": peer.PACKAGES,
    }
    record("dvae_quality", result, results)


if __name__ == "__main__":
    main()
