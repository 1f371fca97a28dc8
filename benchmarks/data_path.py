"""Speed of the data path, from 256-pixel JPEGs to batches, relative to bare JPEG decoding.

    python -m benchmarks.data_path --photos FOLDER

The images are photos from the folder, cropped to 256-pixel squares and saved at quality 95, as web-scale sets are.
Without a folder they are synthetic: smooth and quick to decode, so the ratio is less favourable. The data path is the
datamodule's own: rows or streamed records, decoding, crop, caption, tokens and batch. Bare decoding turns bytes into
RGB pixels, with Pillow and with simplejpeg, which the data path uses.

All take turns batch by batch in one process without workers, because the speed of a shared core changes within seconds.
The benchmark counts CPU time, prints the medians of the rounds, and appends them to benchmarks/results/data_path.jsonl.
"""

import io
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageOps
from simplejpeg import decode_jpeg

from benchmarks.recording import record, run
from lightning_dalle.data.datamodule import Batch, CaptionedImageDataModule
from lightning_dalle.data.sources.captioned import CaptionedImages

NUM_IMAGES, PASSES, ROUNDS, BATCH = 256, 4, 9, 32


def read_photos(folder: Path) -> list[bytes]:
    """Return the first JPEGs of a folder, cropped to squares of 256 pixels."""
    files = sorted(folder.rglob("*.jpg"))[:NUM_IMAGES]
    if len(files) < NUM_IMAGES:
        raise SystemExit(
            f"error: {folder} has {len(files)} JPEGs, but the benchmark needs {NUM_IMAGES}; choose a larger --photos"
        )
    return [jpeg(ImageOps.fit(PILImage.open(file).convert("RGB"), (256, 256)), quality=95) for file in files]


def synthetic(number: int) -> bytes:
    """Return a JPEG of smooth shapes with some noise."""
    rng = np.random.default_rng(number)
    coarse = PILImage.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((256, 256))
    pixels = np.asarray(coarse).astype(int) + rng.normal(0, 8, (256, 256, 3))
    return jpeg(PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)), quality=85)


def jpeg(image: PILImage.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def decode_with_pillow(content: bytes) -> np.ndarray:
    return np.asarray(PILImage.open(io.BytesIO(content)).convert("RGB"))


def decode_with_simplejpeg(content: bytes) -> np.ndarray:
    return decode_jpeg(content, "RGB")


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    "pillow": decode_with_pillow,
    "simplejpeg": decode_with_simplejpeg,
}


def in_turns(batches: Iterable[Batch], undecoded: Iterator[bytes]) -> dict[str, float]:
    """Return the CPU seconds per image of the data path and of each decoder, which take turns after every batch."""
    seconds, count = Counter[str](), 0
    waiting = iter(batches)
    begun = time.process_time()
    while (batch := next(waiting, None)) is not None:
        seconds["data_path"] += time.process_time() - begun
        count += len(batch.ids)
        for name, decode in DECODERS.items():
            begun = time.process_time()
            for content in itertools.islice(undecoded, len(batch.ids)):
                decode(content)
            seconds[name] += time.process_time() - begun
        begun = time.process_time()
    return {name: total / count for name, total in seconds.items()}


def main(photos: Path | None = None) -> None:
    """Measure rows and streamed records.

    Args:
        photos: folder with at least 256 JPEGs; synthetic images if not given.
    """
    torch.set_num_threads(1)
    contents = [synthetic(number) for number in range(NUM_IMAGES)] if photos is None else read_photos(photos)
    with tempfile.TemporaryDirectory() as parquet:
        rows = [
            {"image": {"bytes": content, "path": None}, "captions": [f"a smooth image with the number {i}"]}
            for i, content in enumerate(contents)
        ]
        features = Features(image=Image(), captions=List(Value("string")))
        for split in ("train", "val"):
            Dataset.from_list(rows, features=features).to_parquet(Path(parquet) / f"{split}.parquet")

        def loader(streamed: bool) -> Iterable[Batch]:
            source = CaptionedImages(path=parquet, streaming=streamed)
            data = CaptionedImageDataModule(
                source,
                image_size=256,
                batch_size=BATCH,
                text_len=64,
                vocab_size=512,
                # Each epoch refills the buffer: by default 1/100 of its records, here 1/16.
                epoch_length=PASSES * NUM_IMAGES,
                shuffle_buffer=PASSES * NUM_IMAGES // 16,
            )
            data.setup("fit")
            return data.train_dataloader()

        undecoded = itertools.cycle(contents)
        loaders = {"rows": loader(False), "streamed": loader(True)}
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
        for _, (name, batches) in itertools.product(range(ROUNDS + 1), loaders.items()):
            taken[name].append(in_turns(batches, undecoded))
    rounds = {name: times[1:] for name, times in taken.items()}  # the first round warms up
    decoding = {decoder: [seconds[decoder] for times in rounds.values() for seconds in times] for decoder in DECODERS}
    path = {name: [seconds["data_path"] for seconds in times] for name, times in rounds.items()}
    speeds = {name: 1 / statistics.median(seconds) for name, seconds in {**decoding, **path}.items()}
    ratios = {
        decoder: {
            name: round(statistics.median(seconds[decoder] / seconds["data_path"] for seconds in times), 3)
            for name, times in rounds.items()
        }
        for decoder in DECODERS
    }
    result = {
        "images_per_cpu_second": {name: round(speed, 1) for name, speed in speeds.items()},
        "relative_to_decoding": ratios,
        "images": "synthetic" if photos is None else "photos",
        "bytes_per_image": round(sum(map(len, contents)) / NUM_IMAGES),
        "rounds": ROUNDS,
        "passes_per_round": PASSES,
    }
    record("data_path", result)


if __name__ == "__main__":
    run(main)
