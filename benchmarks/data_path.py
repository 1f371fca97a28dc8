"""How much of the speed of bare decoding the data path keeps: 256-pixel JPEGs to batches, on the same cores.

    python -m benchmarks.data_path [FOLDER]

The pictures are the photos in the folder and below it, cropped to squares of 256 pixels and written at quality 95, as
web-scale sets are kept; without a folder they are made, smooth and quick to decode, so the data path looks worse.
Rounds of both take turns in one process, without workers, so that both have the same core; what is counted is its CPU
time, which other work on the machine disturbs less than the clock's. Bare decoding is Pillow's, from bytes to RGB
pixels. The data path is the datamodule's own: rows or streamed records, reading, crop, caption, tokens and batch.
Prints the medians and their ratio, and appends them to benchmarks/results/data_path.jsonl.
"""

import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageOps

from benchmarks.recording import record
from lightning_dalle.data.captioned import CaptionedPictures
from lightning_dalle.data.datamodule import CaptionedImageDataModule

PICTURES, PASSES, ROUNDS, BATCH = 256, 4, 5, 32


def photos(folder: Path) -> list[bytes]:
    """Of the first JPEGs of a folder, squares of 256 pixels."""
    files = sorted(folder.rglob("*.jpg"))[:PICTURES]
    if len(files) < PICTURES:
        raise SystemExit(f"the benchmark takes {PICTURES} photos, but there are {len(files)} JPEGs in {folder}")
    return [jpeg(ImageOps.fit(PILImage.open(file).convert("RGB"), (256, 256)), quality=95) for file in files]


def made(number: int) -> bytes:
    """Smooth shapes with some noise."""
    rng = np.random.default_rng(number)
    coarse = PILImage.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((256, 256))
    pixels = np.asarray(coarse).astype(int) + rng.normal(0, 8, (256, 256, 3))
    return jpeg(PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)), quality=85)


def jpeg(image: PILImage.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def seconds_of_cpu(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main(folder: Path | None = None) -> None:
    torch.set_num_threads(1)
    contents = [made(number) for number in range(PICTURES)] if folder is None else photos(folder)
    with tempfile.TemporaryDirectory() as parquet:
        rows = [
            {"image": {"bytes": content, "path": None}, "captions": [f"a smooth picture with the number {i}"]}
            for i, content in enumerate(contents)
        ]
        features = Features(image=Image(), captions=List(Value("string")))
        for split in ("train", "val"):
            Dataset.from_list(rows, features=features).to_parquet(Path(parquet) / f"{split}.parquet")

        def loader(streamed: bool) -> object:
            source = CaptionedPictures(path=parquet, streamed=streamed)
            data = CaptionedImageDataModule(
                source,
                image_size=256,
                batch_size=BATCH,
                text_len=64,
                vocab_size=512,
                # The buffer is filled again at the start of an epoch: by default a hundredth of it, here a sixteenth.
                epoch_length=PASSES * PICTURES,
                shuffle_buffer=PASSES * PICTURES // 16,
            )
            data.setup("fit")
            return data.train_dataloader()

        def decode() -> None:
            for content in contents:
                np.asarray(PILImage.open(io.BytesIO(content)).convert("RGB"))

        work: dict[str, Callable[[], object]] = {"decoding": decode}
        for name, streamed in {"rows": False, "streamed": True}.items():
            batches = loader(streamed)
            work[name] = lambda batches=batches: sum(len(batch.images) for batch in batches)
        times: dict[str, list[float]] = {name: [] for name in work}
        for _, (name, run) in itertools.product(range(ROUNDS + 1), work.items()):
            times[name].append(seconds_of_cpu(run) / PICTURES / (PASSES if name == "streamed" else 1))
    speeds = {name: 1 / statistics.median(taken[1:]) for name, taken in times.items()}  # the first warms up
    result = {
        "pictures_per_second_of_cpu": {name: round(speed, 1) for name, speed in speeds.items()},
        "of_decoding": {name: round(speeds[name] / speeds["decoding"], 3) for name in ("rows", "streamed")},
        "pictures": "made" if folder is None else "photos",
        "bytes_of_a_picture": round(sum(map(len, contents)) / PICTURES),
        "rounds": ROUNDS,
        "passes_of_a_streamed_round": PASSES,
    }
    record("data_path", result)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
