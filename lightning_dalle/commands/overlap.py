"""`data overlap`: list training images that are near-duplicates of a reference set's, or of each other."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dalle.commands.data import read_datamodule
from lightning_dalle.errors import UserError
from lightning_dalle.files import make_folder, write_json
from lightning_dalle.provenance import commit

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from PIL.Image import Image

    from lightning_dalle.data.images.duplicates import DuplicatePair

PAIRS_PER_SIDE = 24
"""Maximum number of pairs in borderline.png above the threshold, and below it."""


def overlap(
    config: Path,
    out: Path,
    reference: str | None = None,
    reference_split: str = "validation",
    within: bool = False,
    threshold: float = 0.3,
    data: dict[str, Any] | None = None,
) -> None:
    """Find training images that are near-duplicates of a reference set's, or of each other.

    Writes excluded.tsv, the list that the filter lightning_dalle.data.filters.exclusions.Excluded reads, and
    borderline.png, the pairs nearest to the threshold on either side. Look at them before you use the list.

    Args:
        config: config of a fit, or the keys of its data alone.
        out: output folder; it must not contain these files yet.
        reference: images that must not be trained on: a folder of images, or a name or folder that the source
            CaptionedImages reads.
        reference_split: name of the reference's split, unless the reference is a folder of images.
        within: compare the training images with each other; the first of each group of duplicates is kept.
        threshold: largest distance of a near-duplicate, from 0 (equal) to 1 (unrelated). Copies of 330 photos had
            distances up to 0.11, different photos at least 0.51.
        data: config keys of the data to override, such as `--data.source.init_args.path my/images`.
    """
    if (reference is not None) == within:
        found = "both" if within else "neither"
        raise UserError(f"give either --reference or --within true; this command has {found}")
    if not 0 < threshold < 1:
        raise UserError(f"threshold is {threshold}, but must be between 0 and 1")
    excluded, borderline, summary = (out / name for name in ("excluded.tsv", "borderline.png", "overlap.json"))
    for file in (out, excluded, borderline, summary):
        if file.is_file():
            raise UserError(f"{file} already exists; choose another --out")
    datamodule = read_datamodule(config, data or {})

    from datasets import Dataset

    from lightning_dalle.data.filters.exclusions import Exclusion, write_exclusions
    from lightning_dalle.data.images.duplicates import pairs_with_reference, pairs_within
    from lightning_dalle.data.loading.streaming import ShardReader
    from lightning_dalle.images import save_png

    rows = training_rows(datamodule.source.load(datamodule.image_size))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    if reference is not None:
        records = rows if isinstance(rows, Dataset) else ShardReader(rows, 0, 1, None, 100).one_pass()
        pairs = pairs_with_reference(records, reference_records(reference, reference_split), counts)
    elif isinstance(rows, Dataset):
        pairs = pairs_within(rows, threshold, counts)
    else:
        raise UserError("--within true needs data that is not streamed; set `streaming: false` in the data's source")
    reason = f"near-duplicate of {'an earlier record' if reference is None else reference}"
    exclusions: dict[str, Exclusion] = {}
    nearest: dict[bool, list[DuplicatePair]] = {True: [], False: []}
    for pair in pairs:
        is_duplicate = pair.distance <= threshold
        if is_duplicate:
            exclusions[pair.id] = Exclusion(pair.id, reason, pair.match, pair.distance)
        by_gap = sorted([*nearest[is_duplicate], pair], key=lambda pair: abs(pair.distance - threshold))
        nearest[is_duplicate] = by_gap[:PAIRS_PER_SIDE]
    make_folder(out)
    write_exclusions(excluded, sorted(exclusions.values(), key=lambda exclusion: -exclusion.distance))
    if any(nearest.values()):
        save_png(pair_grid([*nearest[True], *nearest[False]], threshold), borderline, None)
    result = {
        "config": str(config),
        "reference": reference,
        "threshold": threshold,
        "images": counts,
        "excluded": len(exclusions),
        "commit": commit(),
    }
    write_json(summary, result)
    for name, counted in counts.items():
        print(f"{name}: {', '.join(f'{count} {outcome}' for outcome, count in counted.items())}")
    print(f"{len(exclusions)} near-duplicates in {excluded}: look at {borderline} before you exclude them")


def training_rows(splits: Mapping[str, "Dataset | IterableDataset"]) -> "Dataset | IterableDataset":
    """Return the split train with undecoded images, and raise a UserError if its records have no ids."""
    from datasets import Dataset
    from datasets import Image as EncodedImage

    if "train" not in splits:
        raise UserError(f"the source has no split train; set its `splits` to {{train: one of {', '.join(splits)}}}")
    rows = splits["train"]
    if not isinstance(rows, Dataset):
        return rows
    if "id" not in rows.column_names:
        raise UserError(
            "`data overlap` lists records by their column id, which the source lacks; choose a source with ids (it has "
            f"{', '.join(rows.column_names)})"
        )
    return rows.cast_column("image", EncodedImage(decode=False))


def reference_records(reference: str, split: str) -> "Sequence[Mapping[str, Any]] | Dataset":
    """Return undecoded images with ids: the image files of a folder, or a split that `CaptionedImages` reads."""
    from datasets import Image as EncodedImage

    from lightning_dalle.data.images.decoding import find_images
    from lightning_dalle.data.sources.captioned import CaptionedImages

    folder = Path(reference).expanduser()
    paths, _ = find_images(folder)
    if paths:
        return [{"image": {"bytes": None, "path": str(path)}, "id": str(path.relative_to(folder))} for path in paths]
    splits = CaptionedImages(path=reference, splits={split: split}).load(0)
    return splits[split].cast_column("image", EncodedImage(decode=False))


def pair_grid(pairs: "Sequence[DuplicatePair]", threshold: float) -> "Image":
    """Render pairs in order of distance, each with the training image on the left."""
    from lightning_dalle.data.images.duplicates import PREVIEW_SIDE
    from lightning_dalle.images import captioned_grid

    pairs = sorted(pairs, key=lambda pair: pair.distance)
    titles = [
        f"{pair.distance:.3f} {'excluded' if pair.distance <= threshold else 'kept'}: {pair.id} ~ {pair.match}"
        for pair in pairs
    ]
    return captioned_grid([[pair.open(), pair.open_match()] for pair in pairs], titles, columns=4, side=PREVIEW_SIDE)
