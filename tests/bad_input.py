"""Records from the web: images and captions of every bad kind, each with the expected outcome."""

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

NOISE = random.Random(0).randbytes(3 * 48 * 40)


class BadRecord(NamedTuple):
    """Image and caption, which is the bytes of a text file or a JSON value, and the expected outcome."""

    image: bytes | None
    caption: Any
    reason: str | None
    """Reason for which it must be rejected, or None if it must be kept."""


def noise_image(mode: str = "RGB", format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (48, 40), NOISE).convert(mode).save(file, format, **options)
    return file.getvalue()


def animation() -> bytes:
    frames = [Image.new("P", (48, 40), colour) for colour in (0, 1, 2)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


def sixteen_bit() -> bytes:
    file = io.BytesIO()
    Image.frombytes("I;16", (48, 40), NOISE[: 2 * 48 * 40]).save(file, "PNG")
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return noise_image(format="JPEG", exif=exif)


def bomb() -> bytes:
    """Return a PNG of 20,000 by 20,000 pixels in less than a kilobyte."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = b"a photo of noise"
BAD_IMAGES = (
    BadRecord(noise_image(format="JPEG")[:-400], GOOD, "unreadable image"),  # truncated
    BadRecord(noise_image()[:600], GOOD, "unreadable image"),
    BadRecord(NOISE[:999], GOOD, "unreadable image"),  # corrupt
    BadRecord(noise_image(format="JPEG")[:200] + NOISE[:99], GOOD, "unreadable image"),
    BadRecord(b"", GOOD, "empty image file"),
    BadRecord(bomb(), GOOD, "oversized image"),
    BadRecord(animation(), GOOD, None),
    BadRecord(noise_image("CMYK", "JPEG"), GOOD, None),
    BadRecord(noise_image("P"), GOOD, None),
    BadRecord(noise_image("L"), GOOD, None),
    BadRecord(noise_image("LA"), GOOD, None),
    BadRecord(noise_image("RGBA"), GOOD, None),
    BadRecord(sixteen_bit(), GOOD, None),
    BadRecord(rotated(), GOOD, None),
)
CAPTION_FILES = (
    BadRecord(noise_image(), b"", "missing caption"),
    BadRecord(noise_image(), b" \n\t\n ", "missing caption"),
    BadRecord(noise_image(), b"\x00\x01\x1b", "missing caption"),
    BadRecord(noise_image(), b"\xff\xfe\xfd", "missing caption"),  # invalid UTF-8
    BadRecord(noise_image(), b"a \xff cat\x00 at\x07 night", None),
    BadRecord(noise_image(), b"12345", None),
    BadRecord(noise_image(), b"x" * 10_000, "caption too long"),
)
JSON_CAPTIONS = (
    BadRecord(None, "a cat", "missing image"),
    BadRecord(noise_image(), None, "missing caption"),
    BadRecord(noise_image(), 7, "missing caption"),
    BadRecord(noise_image(), [], "missing caption"),
    BadRecord(noise_image(), [None, 7, " "], "missing caption"),
    BadRecord(noise_image(), {"text": "a cat"}, "missing caption"),
    BadRecord(noise_image(), "\ud83d\x00", "missing caption"),
    BadRecord(noise_image(), ["a cat", None, ["a dog"], 7.5], None),
    BadRecord(noise_image(), "a \ud83d cat", None),
    BadRecord(noise_image(), "a cat " * 1700, "caption too long"),
)


def bad_records(kinds: Sequence[BadRecord], count: int) -> list[BadRecord]:
    """Return a random choice of records, with about equally many of each kind."""
    return random.Random(0).choices(kinds, k=count)


def write_pairs(folder: Path, records: Iterable[BadRecord]) -> None:
    """Write images and caption files of the same name."""
    folder.mkdir()
    for i, record in enumerate(records):
        (folder / f"{i:04d}.png").write_bytes(record.image or b"")
        (folder / f"{i:04d}.txt").write_bytes(record.caption)


def write_tars(folder: Path, records: Sequence[BadRecord], shards: int) -> None:
    """Write WebDataset tars with captions in JSON."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, len(records), shards):
                caption = records[i].caption
                text = caption.decode() if isinstance(caption, bytes) else caption
                files = {"json": json.dumps({"caption": text}).encode(), "png": records[i].image}
                for suffix, content in files.items():
                    if content is not None:
                        entry = tarfile.TarInfo(f"{i:04d}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
