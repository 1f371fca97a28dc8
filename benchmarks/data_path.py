"""How much of the speed of bare decoding the data path keeps: 256-pixel JPEGs to batches, on the same cores.

    python -m benchmarks.data_path

Rounds of both take turns in one process, without workers, so that both have the same core; what is counted is its CPU
time, which other work on the machine disturbs less than the clock's. Bare decoding is Pillow's, from bytes to RGB
pixels. The data path is the datamodule's own: rows or streamed records, reading, crop, caption, tokens and batch.
Prints the medians and their ratio, and appends them to benchmarks/results/data_path.jsonl.
"""

import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from lightning_dalle import machine
from lightning_dalle.data.captioned import CaptionedPictures
from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.records import commit

PICTURES, PASSES, ROUNDS, BATCH = 256, 4, 5, 32
RESULTS = Path(__file__).parent / "results" / "data_path.jsonl"


def photo(number: int) -> bytes:
    """Smooth shapes with some noise: about the 20 kB of a photo of this size."""
    rng = np.random.default_rng(number)
    coarse = PILImage.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((256, 256))
    pixels = np.asarray(coarse).astype(int) + rng.normal(0, 8, (256, 256, 3))
    file = io.BytesIO()
    PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def seconds_of_cpu(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    torch.set_num_threads(1)
    contents = [photo(number) for number in range(PICTURES)]
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"image": {"bytes": content, "path": None}, "captions": [f"a smooth picture with the number {i}"]}
            for i, content in enumerate(contents)
        ]
        features = Features(image=Image(), captions=List(Value("string")))
        for split in ("train", "val"):
            Dataset.from_list(rows, features=features).to_parquet(Path(folder) / f"{split}.parquet")

        def loader(streamed: bool) -> object:
            source = CaptionedPictures(path=folder, streamed=streamed)
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
        "bytes_of_a_picture": round(sum(map(len, contents)) / PICTURES),
        "rounds": ROUNDS,
        "passes_of_a_streamed_round": PASSES,
        "commit": commit(),
        "machine": machine.describe(),
    }
    print(json.dumps(result, indent=2))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
