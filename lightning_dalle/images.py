"""Conversions of images for viewing: PIL images, arrays, captioned grids, and PNG files with metadata."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightning_dalle.files import atomic_write


def to_pil(image: Float[Tensor, "3 h w"]) -> Image.Image:
    """Convert an image in [0, 1] to PIL; values outside are clamped."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy())


def to_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Convert a PIL image to an array of height, width and RGB channels, as TensorBoard expects."""
    return np.asarray(image.convert("RGB"))


def captioned_grid(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], columns: int = 1, side: int = 96
) -> Image.Image:
    """Draw rows of images into one image, with a caption above each row.

    Args:
        rows: images of any size; all rows have the same length.
        captions: one caption per row.
        columns: number of rows that are drawn next to each other.
        side: height and width of each drawn image in pixels; smaller images are enlarged without blur.
    """
    gap, font = 4, ImageFont.load_default(11)
    width = len(rows[0]) * (side + gap) + gap
    lines = [textwrap.wrap(caption, max(8, width // 6))[:3] for caption in captions]
    header = 13 * max(len(wrapped) for wrapped in lines) + gap
    height = header + side + gap
    grid = Image.new("RGB", (columns * width, math.ceil(len(rows) / columns) * height), "white")
    canvas = ImageDraw.Draw(grid)
    for i, (row, wrapped) in enumerate(zip(rows, lines, strict=True)):
        left, top = (i % columns) * width + gap, (i // columns) * height
        canvas.text((left, top), "\n".join(wrapped), fill="black", font=font, spacing=1)
        for j, image in enumerate(row):
            resampling = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            grid.paste(image.resize((side, side), resampling), (left + j * (side + gap), top + header))
    return grid


def save_png(image: Image.Image, path: Path, attribution: str | None, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically, with texts and an optional attribution in its metadata."""
    metadata = PngInfo()
    for name, text in (texts or {}).items():
        metadata.add_itxt(name, text)
    if attribution is not None:
        metadata.add_text("Copyright", attribution)
    with atomic_write(path) as partial:
        image.save(partial, format="PNG", pnginfo=metadata)


def read_png_texts(path: Path) -> dict[str, str]:
    """Return the texts in a PNG's metadata."""
    with Image.open(path) as image:
        return {str(name): text for name, text in image.info.items() if isinstance(text, str)}
