"""Sampling of held-out captions, and comparison of the samples with real images (paper, section 3.1 and Fig. 9)."""

import contextlib
import csv
import hashlib
import io
import itertools
import logging
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from datasets import Image as EncodedImage
from PIL import Image

from lightning_dalle.data.images.decoding import UnreadableImage, read_bytes
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.features import (
    DistributedContext,
    FeatureExtractor,
    image_names,
    images_in_dataset,
    images_in_folder,
)
from lightning_dalle.evaluation.fidelity import fidelity_by_radius
from lightning_dalle.evaluation.protocol import Captions, GenerationProtocol, Protocol
from lightning_dalle.evaluation.statistics import mean
from lightning_dalle.images import read_png_texts, save_png, to_pil
from lightning_dalle.inference.config import check_candidates
from lightning_dalle.inference.pipeline import Request, TextToImage
from lightning_dalle.inference.rerank import best_of_n, score_candidates
from lightning_dalle.progress import progress_bar

log = logging.getLogger(__name__)


class Prompt(NamedTuple):
    """Caption for which images are generated."""

    caption: str
    image_name: str | None
    """Name of the caption's real image; None if the CSV file of captions gives no name."""


def choose_captions(rows: Dataset, choice: Captions) -> list[Prompt]:
    """Return the captions for which a protocol generates images, in order.

    Args:
        rows: dataset with the column `captions`; rows with equal image names count as one image with all captions.
        choice: settings that choose captions.

    Raises:
        UserError: if the CSV file of captions does not exist, is not UTF-8, lacks a column or lists no caption.
    """
    if choice.csv is not None:
        return _read_csv(choice.csv)[: choice.count]
    captions_of: dict[str, list[str]] = {}
    for name, captions in zip(image_names(rows), rows["captions"], strict=True):
        captions_of.setdefault(name, []).extend(captions)
    rng = random.Random(choice.seed)
    prompts = [
        Prompt(caption, name)
        for name, captions in captions_of.items()
        for caption in ([rng.choice(captions)] if choice.one_per_image else captions)
    ]
    if choice.unique:
        first = {prompt.caption: prompt for prompt in reversed(prompts)}
        prompts = [prompt for prompt in prompts if first[prompt.caption] is prompt]
    if choice.count is None:
        return prompts
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(choice.seed))
    return [prompts[i] for i in order[: choice.count]]


def _read_csv(path: Path) -> list[Prompt]:
    if not path.is_file():
        raise UserError(f"there is no file {path}: correct the key captions.csv of the protocol")
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"the CSV of captions {path} is not UTF-8 ({error}): save it as UTF-8") from error
    table = csv.DictReader(io.StringIO(text, newline=""))
    if {"image_id", "prompt"} - set(table.fieldnames or []):
        columns = ", ".join(table.fieldnames or ["none"])
        raise UserError(f"the CSV of captions {path} has the columns {columns}: rename them to image_id and prompt")
    listed = [Prompt((row["prompt"] or "").strip(), row["image_id"]) for row in table]
    prompts = [prompt for prompt in listed if prompt.caption]
    if not prompts:
        raise UserError(f"the CSV of captions {path} lists no caption: give a file with one row per caption")
    if len(prompts) < len(listed):
        log.warning("%s: skipped %d blank captions of %d", path, len(listed) - len(prompts), len(listed))
    return prompts


def reference_index(rows: Dataset, prompts: list[Prompt]) -> list[int | None]:
    """Return the row of each prompt's real image, or None if there is none; leading zeros of names are ignored."""
    row_of = {name.lstrip("0"): i for i, name in reversed(list(enumerate(image_names(rows))))}
    names = [prompt.image_name for prompt in prompts]
    return [None if name is None else row_of.get(name.lstrip("0")) for name in names]


def choose_reference(rows: Dataset, protocol: Protocol) -> Dataset:
    """Return the rows of the protocol's reference images, each image once.

    Raises:
        UserError: if `protocol.reference` is `captions`, and no chosen caption has an image in these rows.
    """
    if protocol.reference == "captions":
        prompts = choose_captions(rows, protocol.generation.captions)
        found = dict.fromkeys(i for i in reference_index(rows, prompts) if i is not None)
        if not found:
            raise UserError(
                f"none of the {len(prompts)} captions of the protocol {protocol.name} has an image in the split "
                f"{protocol.generation.split}: set `reference: split`"
            )
        return rows.select(list(found))
    first = {name: i for i, name in reversed(list(enumerate(image_names(rows))))}
    rows = rows.select(sorted(first.values()))
    if protocol.reference_count is None or protocol.reference_count >= len(rows):
        return rows
    chosen = random.Random(protocol.fidelity.seed).sample(range(len(rows)), protocol.reference_count)
    return rows.select(sorted(chosen))


def generate_samples(
    pipeline: TextToImage,
    prompts: list[Prompt],
    generation: GenerationProtocol,
    folders: Mapping[int, Path],
    batch_size: int = 64,
    context: DistributedContext = DistributedContext(),  # noqa: B008 (immutable)
) -> None:
    """Sample the candidates of every caption and save the best of the first n, for each n of the protocol.

    The file 000123.png is sample 123, with its caption, seed and score as metadata. Existing files are kept, so an
    interrupted run resumes.

    Args:
        pipeline: DALL-E and dVAE, with a scorer if each caption has several candidates.
        prompts: captions for which images are generated.
        generation: settings of candidates, sampling and seed.
        folders: folder for the best of n candidates, by n.
        batch_size: number of candidates sampled at once.
        context: rank and world size of this process.

    Raises:
        UserError: if captions have several candidates and the pipeline has no scorer.
    """
    check_candidates(generation.candidates, has_scorer=pipeline.scorer is not None)
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    num_candidates = generation.candidates[-1]
    indices = context.indices(len(prompts) * generation.samples_per_caption)
    todo = [i for i in indices if not (folders[num_candidates] / f"{i:06d}.png").exists()]
    done, total = (len(indices) - len(todo)) * num_candidates, len(indices) * num_candidates
    at_once = max(1, batch_size // num_candidates)
    with progress_bar("Sampling captions") as on_progress:
        on_progress(done, total)
        for start in range(0, len(todo), at_once):
            captions = {i: prompts[i // generation.samples_per_caption].caption for i in todo[start : start + at_once]}
            first_seed = {i: generation.seed + i * num_candidates for i in captions}
            requests = [Request(captions[i], first_seed[i] + n) for i in captions for n in range(num_candidates)]

            def on_code(codes: int, of: int, done: int = done, count: int = len(requests)) -> None:
                on_progress(done + count * codes // of, total)

            images = pipeline.sample_images(requests, generation.sampling, batch_size=batch_size, on_progress=on_code)
            for i, caption in captions.items():
                candidates = itertools.islice(images, num_candidates)
                for n, best in best_of_n(
                    score_candidates(candidates, caption, pipeline.scorer, batch_size), generation.candidates
                ):
                    texts = {"caption": caption, "seed": str(first_seed[i] + best.number)}
                    texts |= {} if best.score is None else {"score": repr(best.score)}
                    save_png(to_pil(best.image), folders[n] / f"{i:06d}.png", pipeline.attribution, texts)
            done += len(requests)
        on_progress(done, total)
    context.barrier()


def measure_samples(
    folders: Mapping[int, Path], count: int, rows: Dataset, data_name: str, extractor: FeatureExtractor
) -> dict[str, Any]:
    """Return the figures of saved samples, for each number of candidates and each blur radius.

    Args:
        folders: folder of the best of n candidates, by n.
        count: number of samples that each folder must contain.
        rows: dataset split with the reference images.
        data_name: path or name of the dataset, for messages and results.
        extractor: extractor of the features under the protocol; only its rank 0 returns figures.

    Raises:
        UserError: if a folder lacks samples or contains other images, or if there are too few images for the measures.
    """
    protocol = extractor.protocol
    reference = extractor(images_in_dataset(choose_reference(rows, protocol), data_name))
    by_candidates = {}
    for n, folder in folders.items():
        generated = extractor(images_in_folder(folder))
        expected = {f"{i:06d}.png" for i in range(count)}
        if set(generated.names) != expected:
            wrong = sorted(expected - set(generated.names)) or sorted(set(generated.names) - expected)
            raise UserError(
                f"{folder} must hold {count} readable images, but has {len(generated.names)}: delete "
                f"{', '.join(wrong[:5])}{', ...' if len(wrong) > 5 else ''} there, and run the same command again"
            )
        if extractor.context.rank > 0:
            continue
        scores = [texts["score"] for name in generated.names if "score" in (texts := read_png_texts(folder / name))]
        by_candidates[str(n)] = {
            "score": mean([float(score) for score in scores]) if scores else None,
            "by_blur_radius": fidelity_by_radius(generated.features, reference.features, protocol.fidelity),
        }
    return {
        "by_candidates": by_candidates,
        "reference": {"data": data_name, "split": protocol.generation.split, **reference.counts()},
    }


def first_samples(folder: Path, count: int) -> list[Image.Image]:
    """Return the first `count` PNG images of a folder in the order of their names."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))[:count]]


def count_shared_images(training: Dataset, reference: Dataset) -> int:
    """Count the reference images whose encoded bytes also occur in the training data."""
    known = set(_content_hashes(training))
    return sum(found in known for found in _content_hashes(reference))


def _content_hashes(rows: Dataset) -> Iterator[bytes]:
    for row in rows.select_columns("image").cast_column("image", EncodedImage(decode=False)):
        with contextlib.suppress(UnreadableImage):
            yield hashlib.sha256(read_bytes(row["image"])).digest()
