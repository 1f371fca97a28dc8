"""Training speed of the transformer from precomputed codes, relative to the same run from pixels.

    python -m benchmarks.encoded
    python -m benchmarks.encoded --photos FOLDER
    python -m benchmarks.encoded --case paper_dvae --steps 6 --pairs 3

Fits from pixels and from codes take turns in one process, each with everything that the config asks for. The time
counts from the end of the second step to the end of the last. The dVAE is untrained and the codes are random, which
does not change the time. The benchmark prints the ratios of the pairs and their median, and appends them to
benchmarks/results/encoded.jsonl.
"""

import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from PIL import Image
from pytorch_lightning import Callback

from benchmarks.recording import record, run
from lightning_dalle.checkpoints import dvae_metadata, weights_digest
from lightning_dalle.data.images.transforms import Augmentation, DALLEAugmentation
from lightning_dalle.data.sources.captioned import CaptionedImages
from lightning_dalle.data.sources.encoded import EncodedImages, Encoding, code_type, write_shard
from lightning_dalle.data.sources.openmoji import OpenMoji
from lightning_dalle.data.sources.source import Source
from lightning_dalle.lightning_cli import run_lightning
from lightning_dalle.models.dvae import DVAE, DVAEConfig


class Stopwatch(Callback):
    """Callback that records wall-clock time and CPU time at the end of every step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def rate(self, clock: int) -> float:
        """Return the steps per second by one of the two clocks, without the first two steps, which allocate memory."""
        return (len(self.times) - 2) / (self.times[-1][clock] - self.times[1][clock])


def quickstart_dvae() -> DVAEConfig:
    config = yaml.safe_load(Path("configs/openmoji/quickstart_dvae.yaml").read_text())
    return DVAEConfig(image_size=32, **config["model"]["init_args"]["config"])


def write_codes(folder: Path, dvae: DVAE, source: Source, augmentation: Augmentation | None) -> None:
    """Write shards of random codes as if the dVAE had encoded the source."""
    rows = source.load(dvae.config.image_size)
    encoding = Encoding(
        dvae=weights_digest(dvae), grid=dvae.config.grid, codebook_size=dvae.config.codebook_size,
        image_size=dvae.config.image_size, augmentation=repr(augmentation), crops={"train": 1, "val": 1},
        records={split: len(rows[split]) for split in ("train", "val")}, shard_size=4096, source=repr(source),
        filters="[]", seed=0, attribution=None, made_on={},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for shard in encoding.shards:
        shape = (len(shard.records), encoding.grid, encoding.grid)
        codes = rng.integers(encoding.codebook_size, size=shape, dtype=code_type(encoding.codebook_size))
        write_shard(folder, shard, encoding, rows[shard.split], codes)


def source_options(kind: type, path: Path) -> list[str]:
    return ["--data.source", f"{kind.__module__}.{kind.__qualname__}", "--data.source.path", str(path)]


def encoded(
    case: Literal["quickstart", "paper_dvae"] = "quickstart",
    photos: Path | None = None,
    pairs: int = 5,
    steps: int = 60,
) -> None:
    """Compare training from codes with training from pixels.

    Args:
        case: the quickstart, or its transformer on the 32x32 codes of the paper's dVAE at 256 pixels in batches of 2.
        photos: folder of captioned images to use in place of OpenMoji, cropped by the transformer's augmentation.
        pairs: number of fits of each kind.
        steps: number of training steps per fit.
    """
    source = OpenMoji() if photos is None else CaptionedImages(path=str(photos))
    augmentation = None if photos is None else DALLEAugmentation()
    dvae = DVAE(quickstart_dvae() if case == "quickstart" else DVAEConfig())
    watches: dict[str, list[Any]] = {"pixels": [], "codes": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, codes = folder / "dvae.ckpt", folder / "codes"
        codes.mkdir()
        weights = {f"dvae.{key}": value for key, value in dvae.state_dict().items()}
        torch.save({"state_dict": weights, **dvae_metadata(dvae)}, checkpoint)
        write_codes(codes, dvae, source, augmentation)
        fit = [
            "fit", "--config", "configs/openmoji/quickstart_dalle.yaml", "--model.soft_targets", "false",
            "--model.dvae_checkpoint", str(checkpoint), "--data.image_size", str(dvae.config.image_size),
            "--trainer.max_steps", str(steps), "--trainer.limit_val_batches", "0",
            "--trainer.logger.init_args.save_dir", str(folder), "--trainer.callbacks+=benchmarks.encoded.Stopwatch",
            *(["--data.batch_size", "2"] if case == "paper_dvae" else []),
        ]  # fmt: skip
        if augmentation is not None:
            fit += ["--data.augmentation", "lightning_dalle.data.images.transforms.DALLEAugmentation"]
        fits = {
            "pixels": [] if photos is None else source_options(CaptionedImages, photos),
            "codes": source_options(EncodedImages, codes),
        }
        for _ in range(pairs):
            for kind, options in fits.items():
                callbacks = run_lightning([*fit, *options]).trainer.callbacks  # type: ignore[attr-defined]
                [watch] = [callback for callback in callbacks if type(callback).__name__ == "Stopwatch"]
                watches[kind].append(watch)
        images = torch.rand(2 if case == "paper_dvae" else 16, 3, *[dvae.config.image_size] * 2)
    measured = {}
    for clock, name in enumerate(("wall", "cpu")):
        rates = {kind: [watch.rate(clock) for watch in of_kind] for kind, of_kind in watches.items()}
        ratios = [ours / theirs for ours, theirs in zip(rates["codes"], rates["pixels"], strict=True)]
        measured[name] = {
            "steps_per_second": {kind: [round(rate, 3) for rate in values] for kind, values in rates.items()},
            "ratios": [round(ratio, 2) for ratio in ratios],
            "median_ratio": round(statistics.median(ratios), 2),
        }
    result = {
        "case": case,
        "images": "OpenMoji" if photos is None else f"photos of {megapixels(photos):.2f} megapixels",
        "steps": steps,
        **measured,
        "encoding_milliseconds": round(encoding_milliseconds(dvae, images), 1),
        "dvae": asdict(dvae.config),
    }
    record("encoded", result)


def megapixels(folder: Path) -> float:
    """Return the median size of the first JPEGs of a folder, in megapixels."""
    sizes = [Image.open(file).size for file in sorted(folder.rglob("*.jpg"))[:16]]
    return statistics.median(width * height for width, height in sizes) / 1e6


def encoding_milliseconds(dvae: DVAE, images: torch.Tensor) -> float:
    """Return the median milliseconds that the dVAE takes to encode a batch, over five runs."""
    dvae = dvae.eval().to(memory_format=torch.channels_last)
    times = []
    with torch.inference_mode():
        for _ in range(6):
            begun = time.perf_counter()
            dvae.encode(images)
            times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times[1:])


if __name__ == "__main__":
    run(encoded)
