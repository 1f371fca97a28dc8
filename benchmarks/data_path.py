"""How much of the speed of bare decoding the data path keeps: 256-pixel JPEGs to batches, on the same cores.

    python -m benchmarks.data_path [FOLDER]

The pictures are the photos in the folder and below it, cropped to squares of 256 pixels and written at quality 95, as
web-scale sets are kept; without a folder they are made, smooth and quick to decode, so the data path looks worse.
Batches of all take turns in one process, without workers, so that all have the same core at the same speed, which on
a shared machine changes two-fold within seconds; what is counted is its CPU time. Bare decoding, from bytes to RGB
pixels, is Pillow's, which one would write down, and simplejpeg's, which is in the data path. That is the datamodule's
own: rows or streamed records, reading, crop, caption, tokens, batch.
Prints the medians of the rounds, and appends them to benchmarks/results/data_path.jsonl.
"""

import io
import itertools
import statistics
import sys
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

from benchmarks.recording import record
from lightning_dalle.data.datamodule import Batch, CaptionedImageDataModule
from lightning_dalle.data.sources.captioned import CaptionedPictures

PICTURES, PASSES, ROUNDS, BATCH = 256, 4, 9, 32


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


def by_pillow(content: bytes) -> np.ndarray:
    return np.asarray(PILImage.open(io.BytesIO(content)).convert("RGB"))


def by_simplejpeg(content: bytes) -> np.ndarray:
    return decode_jpeg(content, "RGB")


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {"pillow": by_pillow, "simplejpeg": by_simplejpeg}


def in_turns(batches: Iterable[Batch], undecoded: Iterator[bytes]) -> dict[str, float]:
    """Seconds of CPU a picture takes by the data path, and by each decoder, which does as many after each batch."""
    seconds, pictures = Counter[str](), 0
    waiting = iter(batches)
    begun = time.process_time()
    while (batch := next(waiting, None)) is not None:
        seconds["data_path"] += time.process_time() - begun
        pictures += len(batch.ids)
        for name, decode in DECODERS.items():
            begun = time.process_time()
            for content in itertools.islice(undecoded, len(batch.ids)):
                decode(content)
            seconds[name] += time.process_time() - begun
        begun = time.process_time()
    return {name: total / pictures for name, total in seconds.items()}


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

        def loader(streamed: bool) -> Iterable[Batch]:
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

        undecoded = itertools.cycle(contents)
        loaders = {"rows": loader(False), "streamed": loader(True)}
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in loaders}
        for _, (name, batches) in itertools.product(range(ROUNDS + 1), loaders.items()):
            taken[name].append(in_turns(batches, undecoded))
    rounds = {name: times[1:] for name, times in taken.items()}  # the first warms up
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
        "pictures_per_second_of_cpu": {name: round(speed, 1) for name, speed in speeds.items()},
        "of_decoding": ratios,
        "pictures": "made" if folder is None else "photos",
        "bytes_of_a_picture": round(sum(map(len, contents)) / PICTURES),
        "rounds": ROUNDS,
        "passes_of_a_streamed_round": PASSES,
    }
    record("data_path", result)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
