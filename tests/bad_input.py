"""Records as strangers make them: pictures and captions of every bad kind, each with what has to become of it."""

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
    """A picture and a caption, which is bytes of a text or what JSON holds."""

    picture: bytes | None
    caption: Any
    reason: str | None
    """Why it has to be rejected; none if it has to be kept."""


def picture(mode: str = "RGB", form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (48, 40), NOISE).convert(mode).save(file, form, **options)
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
    return picture(form="JPEG", exif=exif)


def bomb() -> bytes:
    """20,000 pixels square in less than a kilobyte."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = b"a photo of noise"
PICTURES = (
    BadRecord(picture(form="JPEG")[:-400], GOOD, "unreadable picture"),  # truncated
    BadRecord(picture()[:600], GOOD, "unreadable picture"),
    BadRecord(NOISE[:999], GOOD, "unreadable picture"),  # corrupt
    BadRecord(picture(form="JPEG")[:200] + NOISE[:99], GOOD, "unreadable picture"),
    BadRecord(b"", GOOD, "zero bytes"),
    BadRecord(bomb(), GOOD, "too many pixels"),
    BadRecord(animation(), GOOD, None),
    BadRecord(picture("CMYK", "JPEG"), GOOD, None),
    BadRecord(picture("P"), GOOD, None),
    BadRecord(picture("L"), GOOD, None),
    BadRecord(picture("LA"), GOOD, None),
    BadRecord(picture("RGBA"), GOOD, None),
    BadRecord(sixteen_bit(), GOOD, None),
    BadRecord(rotated(), GOOD, None),
)
IN_TEXT = (
    BadRecord(picture(), b"", "without a caption"),
    BadRecord(picture(), b" \n\t\n ", "without a caption"),
    BadRecord(picture(), b"\x00\x01\x1b", "without a caption"),
    BadRecord(picture(), b"\xff\xfe\xfd", "without a caption"),  # no UTF-8
    BadRecord(picture(), b"a \xff cat\x00 at\x07 night", None),
    BadRecord(picture(), b"12345", None),
    BadRecord(picture(), b"x" * 10_000, "caption too long"),
)
IN_JSON = (
    BadRecord(None, "a cat", "without a picture"),
    BadRecord(picture(), None, "without a caption"),
    BadRecord(picture(), 7, "without a caption"),
    BadRecord(picture(), [], "without a caption"),
    BadRecord(picture(), [None, 7, " "], "without a caption"),
    BadRecord(picture(), {"text": "a cat"}, "without a caption"),
    BadRecord(picture(), "\ud83d\x00", "without a caption"),
    BadRecord(picture(), ["a cat", None, ["a dog"], 7.5], None),
    BadRecord(picture(), "a \ud83d cat", None),
    BadRecord(picture(), "a cat " * 1700, "caption too long"),
)


def bad_records(kinds: Sequence[BadRecord], count: int) -> list[BadRecord]:
    """Of each kind about as many, drawn by seed."""
    return random.Random(0).choices(kinds, k=count)


def write_pairs(folder: Path, records: Iterable[BadRecord]) -> None:
    """Pictures beside texts."""
    folder.mkdir()
    for i, record in enumerate(records):
        (folder / f"{i:04d}.png").write_bytes(record.picture or b"")
        (folder / f"{i:04d}.txt").write_bytes(record.caption)


def write_tars(folder: Path, records: Sequence[BadRecord], shards: int) -> None:
    """WebDataset, the captions in JSON."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, len(records), shards):
                caption = records[i].caption
                text = caption.decode() if isinstance(caption, bytes) else caption
                files = {"json": json.dumps({"caption": text}).encode(), "png": records[i].picture}
                for suffix, content in files.items():
                    if content is not None:
                        entry = tarfile.TarInfo(f"{i:04d}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
