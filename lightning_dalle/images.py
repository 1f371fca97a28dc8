"""Tensors to pictures that a person looks at.

Knows pixels and how to write under them. Knows nothing of models.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lightning_dalle.files import atomic_write


def to_pil(image: Float[Tensor, "3 h w"]) -> Image.Image:
    """A PIL image of values in [0, 1]."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy())


def captioned_grid(
    rows: Sequence[Sequence[Image.Image]], captions: Sequence[str], columns: int = 1, side: int = 96
) -> Image.Image:
    """Rows of pictures, a caption above each row, as one sheet.

    Args:
        rows: pictures of any size; every row of the same length.
        captions: one for each row.
        columns: how many rows stand side by side.
        side: height and width of each picture on the sheet, in pixels; small pictures are enlarged without blur.
    """
    gap, font = 4, ImageFont.load_default(11)
    width = len(rows[0]) * (side + gap) + gap
    lines = [textwrap.wrap(caption, max(8, width // 6))[:3] for caption in captions]
    header = 13 * max(len(wrapped) for wrapped in lines) + gap
    height = header + side + gap
    sheet = Image.new("RGB", (columns * width, math.ceil(len(rows) / columns) * height), "white")
    canvas = ImageDraw.Draw(sheet)
    for i, (row, wrapped) in enumerate(zip(rows, lines, strict=True)):
        left, top = (i % columns) * width + gap, (i // columns) * height
        canvas.text((left, top), "\n".join(wrapped), fill="black", font=font, spacing=1)
        for j, picture in enumerate(row):
            smaller = picture.width < side
            enlarged = picture.resize((side, side), Image.Resampling.NEAREST if smaller else Image.Resampling.LANCZOS)
            sheet.paste(enlarged, (left + j * (side + gap), top + header))
    return sheet


def save(
    picture: Image.Image, path: Path, attribution: str | None, texts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes a PNG, there whole or not at all, with texts and the attribution, if there is one, in its metadata."""
    metadata = PngInfo()
    for name, text in texts.items():
        metadata.add_itxt(name, text)
    if attribution is not None:
        metadata.add_text("Copyright", attribution)
    with atomic_write(path) as partial:
        picture.save(partial, format="PNG", pnginfo=metadata)


def texts_of(path: Path) -> dict[str, str]:
    """The texts in a PNG's metadata."""
    with Image.open(path) as picture:
        return {str(name): text for name, text in picture.info.items() if isinstance(text, str)}


def to_array(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Height, width and channel of a picture as bytes, as TensorBoard takes it."""
    return np.asarray(picture.convert("RGB"))
