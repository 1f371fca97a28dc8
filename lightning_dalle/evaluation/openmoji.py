"""The openmoji protocol: does a dVAE keep emoji apart, and does a DALL-E compose what it never saw together?

Knows the OpenMoji splits, models and measures. Knows nothing of training or of where the numbers go.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lightning_dalle.data.images.transforms import to_image
from lightning_dalle.data.sources.openmoji import OpenMoji
from lightning_dalle.evaluation.features import Pictures, read_pictures
from lightning_dalle.evaluation.fidelity import fidelity
from lightning_dalle.evaluation.inception import Inception, weights_at_hand
from lightning_dalle.evaluation.kmeans import kmeans_reconstructions
from lightning_dalle.evaluation.metrics import CodebookUse, Nearest, Retrieval
from lightning_dalle.evaluation.protocol import FidelityOptions, Preparation
from lightning_dalle.evaluation.statistics import expected_best, mean, mean_of_shares, psnr, share, share_of
from lightning_dalle.images import captioned_grid, to_pil
from lightning_dalle.inference.config import Reranking, SamplingOptions
from lightning_dalle.inference.pipeline import Request, TextToImage
from lightning_dalle.inference.rerank import scored
from lightning_dalle.inference.scorers import identity
from lightning_dalle.models.clip import CLIP
from lightning_dalle.models.dvae import DVAE


class Emoji:
    """All captioned emoji at one size: images in [0, 1] and, beside them, what each shows."""

    def __init__(self, image_size: int) -> None:
        splits = OpenMoji().load(image_size)
        self.rows: Dataset = concatenate_datasets(list(splits.values()))
        self.split_of = [name for name, split in splits.items() for _ in range(len(split))]
        self.images: Float[Tensor, "n 3 h w"] = torch.stack(
            [to_image(picture, image_size) for picture in self.rows["image"]]
        )
        self.picture = self.rows["picture"][:]
        self.tones = self.rows["tones"][:]
        self.captions = [captions[0] for captions in self.rows["captions"]]

    @cached_property
    def nearest(self) -> Nearest:
        """Of all of them."""
        return Nearest(self.images)

    def of(self, split: str) -> list[int]:
        """Indices of a split's emoji."""
        return [i for i, name in enumerate(self.split_of) if name == split]


def measure_dvae(dvae: DVAE, emoji: Emoji) -> dict[str, Any]:
    """Reconstructions of `val` by argmax codes, beside a k-means codebook of the same grid and size.

    A reconstruction is retrieved if the nearest of all captioned emoji, in pixels, is its original (or shows the very
    same picture). Those of `compositions` are judged as a DALL-E's pictures of them: what the dVAE alone gets wrong.
    """
    val, compositions = emoji.of("val"), emoji.of("compositions")
    originals = emoji.images[val]
    device = next(dvae.parameters()).device

    def encoded_and_decoded(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            codes = torch.cat([dvae.encode(part.to(device)) for part in images.split(64)])
            return codes, torch.cat([dvae.decode(part) for part in codes.split(64)]).cpu()

    codes, made = encoded_and_decoded(originals)
    use = CodebookUse(dvae.config.codebook_size)
    use.update(codes.cpu())
    patches = kmeans_reconstructions(
        emoji.images[emoji.of("train")], originals, dvae.config.downsampling, dvae.config.codebook_size
    )

    def quality(reconstructions: Tensor) -> dict[str, Any]:
        found = emoji.nearest(reconstructions).tolist()
        return {
            "psnr_db": psnr((reconstructions - originals).square().mean((1, 2, 3)).tolist()),
            "retrieval": share([emoji.picture[i] == emoji.picture[j] for i, j in zip(found, val, strict=True)]),
        }

    return {
        "protocol": {
            "data": "OpenMoji, split val",
            "images": len(val),
            "image_size": dvae.config.image_size,
            "grid": dvae.config.grid,
            "codebook_size": dvae.config.codebook_size,
            "codes": "argmax",
            "psnr": "of the mean squared error over all pixels of all images in [0, 1]",
            "retrieval": f"nearest in Euclidean distance of pixels among all {len(emoji.rows)} captioned emoji",
            "kmeans": "scikit-learn, fitted to 100,000 random training patches, 50 iterations",
        },
        "dvae": {
            **quality(made),
            "codebook_perplexity": round(float(use.compute()), 1),
            "codes_used": dvae.config.codebook_size - int(use.dead),
            "compositions": _shares_right(encoded_and_decoded(emoji.images[compositions])[1], compositions, emoji),
        },
        "kmeans": quality(patches),
    }


def measure_dalle(
    pipeline: TextToImage,
    emoji: Emoji,
    num_prompts: int,
    sampling: SamplingOptions,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    seed: int = 0,
) -> tuple[dict[str, Any], list[int], list[Image.Image]]:
    """Held-out compositions, one sample each: is the nearest real emoji the one asked for, and of its skin tone?

    Returns:
        the numbers, the indices of the emoji asked for, and the samples.
    """
    asked = _asked(emoji, num_prompts, seed)
    requests = [Request(emoji.captions[i], seed + n) for n, i in enumerate(asked)]
    samples = torch.stack(list(pipeline.draw(requests, sampling, on_progress=on_progress))).cpu()
    numbers = {
        "protocol": {
            "data": "OpenMoji, split compositions",
            "prompts": len(asked),
            "samples_per_prompt": 1,
            "reranking": None,
            "sampling": asdict(sampling),
            "seed": seed,
            "right": f"nearest in Euclidean distance of pixels among all {len(emoji.rows)} captioned emoji",
        },
        **_shares_right(samples, asked, emoji),
    }
    return numbers, asked, [to_pil(sample) for sample in samples]


def measure_clip(clip: CLIP, emoji: Emoji, count: int = 200) -> dict[str, Any]:
    """Do pictures of `val`, which it was not trained on, find their captions among as many, and captions theirs?"""
    val = emoji.of("val")[:count]
    found = Retrieval()
    with torch.inference_mode():
        found.update(
            clip.embed_images(emoji.images[val].to(clip.mean.device)),
            clip.embed_texts([emoji.captions[i] for i in val]),
        )
    return {
        "protocol": {"data": "OpenMoji, split val", "pictures": len(val), "ties": "count against"},
        **{name: share_of(round(float(value) * len(val)), len(val)) for name, value in found.compute().items()},
    }


def measure_reranking(
    pipeline: TextToImage,
    emoji: Emoji,
    options: Reranking,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    seed: int = 0,
    batch_size: int = 512,
) -> dict[str, Any]:
    """Is the best of so many candidates right, and what is its score (paper, Fig. 9c)?

    Of each number of candidates the mean over all sets of so many of a prompt's, then over the prompts, whose spread
    gives the interval.
    """
    asked = _asked(emoji, options.prompts, seed)
    most = options.candidates[-1]
    requests = [Request(emoji.captions[i], seed + n * most + j) for n, i in enumerate(asked) for j in range(most)]
    images = pipeline.draw(requests, options.sampling, batch_size=batch_size, on_progress=on_progress)
    expected: dict[int, dict[str, list[float]]] = {size: {} for size in options.candidates}
    for i in asked:
        candidates = list(scored(itertools.islice(images, most), emoji.captions[i], pipeline.scorer, batch_size))
        scores = [candidate.score or 0.0 for candidate in candidates]
        drawn = torch.stack([candidate.image for candidate in candidates]).cpu()
        judged: dict[str, Sequence[float | bool]] = {**_right(drawn, [i] * most, emoji), "score": scores}
        for size, figures in expected.items():
            for name, values in judged.items():
                figures.setdefault(name, []).append(expected_best(values, scores, size))
    return {
        "protocol": {
            "data": "OpenMoji, split compositions",
            "prompts": len(asked),
            "ranked_by": identity(pipeline.scorer),
            "best_of": f"mean over all sets of so many of the {most} candidates of a prompt",
            "sampling": asdict(options.sampling),
            "seed": seed,
        },
        "by_candidates": {
            str(size): {
                name: mean(values) if name == "score" else mean_of_shares(values, trials=most / size)
                for name, values in figures.items()
            }
            for size, figures in expected.items()
        },
    }


def _asked(emoji: Emoji, count: int, seed: int) -> list[int]:
    """Held-out compositions, the first of an order that depends on the seed alone."""
    held_out = emoji.of("compositions")
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))[:count]
    return [held_out[i] for i in order]


def _right(samples: Float[Tensor, "n 3 h w"], asked: list[int], emoji: Emoji) -> dict[str, list[bool]]:
    """Of each sample: is the nearest real emoji the one asked for, and of its skin tone?"""
    found = list(zip(emoji.nearest(samples).tolist(), asked, strict=True))
    return {
        "right_emoji": [emoji.picture[i] == emoji.picture[j] for i, j in found],
        "right_skin_tone": [emoji.tones[i] == emoji.tones[j] for i, j in found],
    }


def _shares_right(samples: Float[Tensor, "n 3 h w"], asked: list[int], emoji: Emoji) -> dict[str, Any]:
    """How many of all."""
    return {name: share(hits) for name, hits in _right(samples, asked, emoji).items()}


def measure_fidelity(
    samples: list[Image.Image],
    emoji: Emoji,
    asked: list[int],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any] | None:
    """FID and its kin of samples against the very emoji that were asked for, as they are, without blur.

    None where Inception's weights are not at hand: nothing is downloaded for it.
    """
    weights = weights_at_hand()
    if weights is None:
        return None
    inception = Inception(weights)
    sides = (samples, [to_pil(emoji.images[i]) for i in asked])
    features = []
    for side, pictures in enumerate(sides):
        named = Pictures("OpenMoji", [str(i) for i in range(len(pictures))], pictures.__getitem__, digest="")

        def on_one(done: int, total: int, begun: int = side * len(samples)) -> None:
            on_progress(begun + done, 2 * total)

        read = read_pictures(named, inception, Preparation(image_size=None), on_progress=on_one)
        features.append(read.features[0])
    return {
        **fidelity(features[0], features[1], FidelityOptions(bootstrap=20)),
        "inception": {"file": weights.name, "sha256": inception.sha256},
    }


def sheet(emoji: Emoji, asked: list[int], samples: list[Image.Image], most: int = 40) -> Image.Image:
    """Prompts with the sample on the left and the real emoji, never seen in training, on the right."""
    rows = [[made, to_pil(emoji.images[i])] for i, made in zip(asked[:most], samples, strict=False)]
    return captioned_grid(rows, [emoji.captions[i] for i in asked[:most]], columns=8, side=80)
