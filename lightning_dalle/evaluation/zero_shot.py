"""A model's own pictures of captions that it was not trained on, against the real ones: which captions, the drawing,
and the figures (paper, section 3.1 and Fig. 9).

Knows a pipeline, a scorer and files. Knows nothing of training or of how results are shown.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from datasets import Image as EncodedImage
from PIL import Image

from lightning_dalle.data.images.decoding import Unreadable, content
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.features import (
    ImageSet,
    Pictures,
    Processes,
    dataset_pictures,
    folder_pictures,
    names_of,
    read_pictures,
)
from lightning_dalle.evaluation.fidelity import fidelity
from lightning_dalle.evaluation.inception import Inception
from lightning_dalle.evaluation.protocol import Captions, Drawing, Protocol
from lightning_dalle.evaluation.statistics import mean
from lightning_dalle.images import save, texts_of, to_pil
from lightning_dalle.inference.pipeline import Request, TextToImage
from lightning_dalle.inference.rerank import best_of, scored
from lightning_dalle.inference.scorers import Scorer

log = logging.getLogger(__name__)


class Prompt(NamedTuple):
    """One caption to draw."""

    caption: str
    picture: str | None
    """What the real picture is called, where it is known."""


def choose_captions(rows: Dataset, choice: Captions) -> list[Prompt]:
    """The captions of a protocol, in order.

    Args:
        rows: with the column captions; several of one name are one picture with the captions of all.
        choice: which of them.

    Raises:
        UserError: if a CSV is to be read that is not there, has other columns or is no text.
    """
    if choice.list is not None:
        prompts = _listed(choice.list)
    else:
        captions_of: dict[str, list[str]] = {}
        for name, captions in zip(names_of(rows), rows["captions"], strict=True):
            captions_of.setdefault(name, []).extend(captions)
        rng = random.Random(choice.seed)
        prompts = []
        for name, captions in captions_of.items():
            taken = [rng.choice(captions)] if choice.one_per_picture else captions
            prompts += [Prompt(caption, name) for caption in taken]
        if choice.unique:
            first: dict[str, Prompt] = {}
            for prompt in prompts:
                first.setdefault(prompt.caption, prompt)
            prompts = list(first.values())
        if choice.count is not None:
            rng.shuffle(prompts)
    return prompts[: choice.count]


def _listed(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise UserError(f"the captions are to be read from {path}, but there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")  # which spreadsheets write; without a mark it is UTF-8 too
    except UnicodeDecodeError as error:
        raise UserError(f"the list of captions {path} is not UTF-8 text: {error}") from error
    table = csv.DictReader(io.StringIO(text, newline=""))
    missing = {"image_id", "prompt"} - set(table.fieldnames or [])
    if missing:
        raise UserError(
            f"a list of captions has the columns image_id and prompt, but {path} has "
            f"{', '.join(table.fieldnames or ['none'])}"
        )
    listed = [Prompt((row["prompt"] or "").strip(), row["image_id"]) for row in table]
    prompts = [prompt for prompt in listed if prompt.caption]
    if not prompts:
        raise UserError(f"{path} lists no caption")
    if len(prompts) < len(listed):
        log.warning("%s: passed over %d blank captions of %d", path, len(listed) - len(prompts), len(listed))
    return prompts


def draw_pictures(
    pipeline: TextToImage,
    prompts: list[Prompt],
    drawing: Drawing,
    folder: Path,
    scorer: Scorer | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = Processes(),  # noqa: B008 (immutable)
) -> None:
    """Draws every caption's pictures that are not in the folder yet; for each size of candidate set the best one.

    `best_of_8/000123.png` is the best of the first eight candidates of picture 123, with its caption, seed and score in
    its metadata. A picture is there whole or not at all, so a killed run goes on where it was.

    Args:
        pipeline: the model.
        prompts: what to draw.
        drawing: how.
        folder: where the pictures are kept.
        scorer: tells which candidate is best; needed for more than one.
        batch_size: pictures made at once.
        on_progress: told how many pictures of how many are there, candidates counted, of this process's share.
        processes: that share the work.

    Raises:
        UserError: if candidates are to be ranked without a scorer.
    """
    check_scorer(drawing, scorer)
    sizes = drawing.candidates
    for size in sizes:
        (folder / f"best_of_{size}").mkdir(parents=True, exist_ok=True)
    total = len(prompts) * drawing.samples_per_caption
    mine = range(processes.rank, total, processes.world)
    todo = [i for i in mine if not (folder / f"best_of_{sizes[-1]}" / f"{i:06d}.png").exists()]
    at_once = max(1, batch_size // sizes[-1])  # pictures whose candidates are drawn together
    done = len(mine) - len(todo)
    on_progress(done * sizes[-1], len(mine) * sizes[-1])
    for start in range(0, len(todo), at_once):
        part = todo[start : start + at_once]
        requests = [
            Request(prompts[i // drawing.samples_per_caption].caption, drawing.seed + i * sizes[-1] + candidate)
            for i in part
            for candidate in range(sizes[-1])
        ]
        begun = done

        def on_code(codes: int, of: int, begun: int = begun, count: int = len(part)) -> None:
            on_progress(int((begun + count * codes / of) * sizes[-1]), len(mine) * sizes[-1])

        images = pipeline.draw(requests, drawing.sampling, batch_size=batch_size, on_progress=on_code)
        for i in part:
            caption = prompts[i // drawing.samples_per_caption].caption
            candidates = scored(itertools.islice(images, sizes[-1]), caption, scorer, batch_size)
            for size, best in best_of(candidates, sizes):
                texts = {
                    "caption": caption,
                    "seed": str(drawing.seed + i * sizes[-1] + best.number),
                    **({} if best.score is None else {"score": repr(best.score)}),
                }
                save(to_pil(best.image), folder / f"best_of_{size}" / f"{i:06d}.png", pipeline.attribution, texts)
            done += 1
    on_progress(done * sizes[-1], len(mine) * sizes[-1])
    processes.barrier()


def check_scorer(drawing: Drawing, scorer: Scorer | None) -> None:
    """Raises a UserError if candidates are to be ranked without a scorer."""
    if scorer is None and drawing.candidates != (1,):
        raise UserError(
            f"the best of {drawing.candidates[-1]} candidates is to be kept, but no scorer is given to rank them"
        )


def measure(
    folder: Path,
    count: int,
    rows: Dataset,
    origin: str,
    protocol: Protocol,
    inception: Inception,
    batch_size: int,
    cache_dir: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = Processes(),  # noqa: B008 (immutable)
) -> dict[str, Any]:
    """Figures of the pictures that `draw_pictures` left, for each number of candidates and each blur radius.

    Args:
        folder: of `draw_pictures`.
        count: pictures that it drew.
        rows: of the split, whose pictures are the reference.
        origin: what the data is called, for messages.
        protocol: what is measured.
        inception: the network, on the device to use.
        batch_size: pictures read at once.
        cache_dir: where features are kept.
        on_progress: told how many pictures of how many are read, of each set anew.
        processes: that share the work; all but the first return no figures.

    Raises:
        UserError: if pictures are missing, or too few for the measures.
    """
    reference_rows = choose_reference(rows, protocol)

    def read(pictures: Pictures) -> ImageSet:
        return read_pictures(
            pictures, inception, protocol.preparation, protocol.blur_radii, batch_size, cache_dir, on_progress,
            processes,
        )  # fmt: skip

    reference = read(dataset_pictures(reference_rows, origin))
    by_candidates = {}
    for size in protocol.drawing.candidates:
        drawn = folder / f"best_of_{size}"
        generated = read(folder_pictures(drawn))
        wanted = {f"{i:06d}.png" for i in range(count)}
        if set(generated.names) != wanted:
            lost = sorted(wanted - set(generated.names)) or sorted(set(generated.names) - wanted)
            raise UserError(
                f"{drawn} should hold {count} readable pictures, but has {len(generated.names)}: remove "
                f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''} there, and they are drawn again"
            )
        if processes.rank > 0:
            continue  # the figures are the first process's to take
        scores = [float(text) for text in (texts_of(drawn / name).get("score") for name in generated.names) if text]
        by_candidates[str(size)] = {
            "score": mean(scores) if scores else None,
            "by_blur_radius": {
                str(radius): fidelity(generated.features[radius], reference.features[radius], protocol.fidelity)
                for radius in protocol.blur_radii
            },
        }
    return {
        "by_candidates": by_candidates,
        "reference": {
            "data": origin,
            "split": protocol.drawing.split,
            "pictures": len(reference.names),
            "skipped": len(reference.skipped),
            "first_skipped": dict(list(reference.skipped.items())[:10]),
        },
    }


def places(rows: Dataset, prompts: list[Prompt]) -> list[int | None]:
    """Which row shows what a prompt's real picture shows; leading zeros of a number do not count."""
    found = {name.lstrip("0"): i for i, name in enumerate(names_of(rows))}
    return [None if prompt.picture is None else found.get(prompt.picture.lstrip("0")) for prompt in prompts]


def choose_reference(rows: Dataset, protocol: Protocol) -> Dataset:
    """The reference pictures, each once: all of a split, or as many as the protocol says, chosen by its seed."""
    first = {name: i for i, name in reversed(list(enumerate(names_of(rows))))}
    if len(first) < len(rows):
        rows = rows.select(sorted(first.values()))
    if protocol.reference_count is None or protocol.reference_count >= len(rows):
        return rows
    chosen = random.Random(protocol.fidelity.seed).sample(range(len(rows)), protocol.reference_count)
    return rows.select(sorted(chosen))


def shared_pictures(training: Dataset, reference: Dataset) -> int:
    """How many reference pictures are, byte for byte, in the training data too."""
    known = set(_content_hashes(training))
    return sum(found in known for found in _content_hashes(reference))


def _content_hashes(rows: Dataset) -> Iterator[bytes]:
    for row in rows.select_columns("image").cast_column("image", EncodedImage(decode=False)):
        with contextlib.suppress(Unreadable):
            yield hashlib.sha256(content(row["image"])).digest()


def first_pictures(folder: Path, size: int, count: int) -> list[Image.Image]:
    """The first pictures that were drawn, best of `size` candidates."""
    return [Image.open(path).convert("RGB") for path in sorted((folder / f"best_of_{size}").glob("*.png"))[:count]]
