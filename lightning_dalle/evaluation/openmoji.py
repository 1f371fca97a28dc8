"""Figures of models of OpenMoji: what a dVAE preserves, and whether a DALL-E composes emoji held out of training."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lightning_dalle.data.images.transforms import to_image
from lightning_dalle.data.sources.openmoji import OpenMoji
from lightning_dalle.evaluation import zero_shot
from lightning_dalle.evaluation.features import FeatureExtractor
from lightning_dalle.evaluation.inception import Inception, find_local_weights
from lightning_dalle.evaluation.kmeans import kmeans_reconstructions
from lightning_dalle.evaluation.metrics import CodebookPerplexity, NearestImages, RetrievalRecall, psnr
from lightning_dalle.evaluation.protocol import Captions, Protocol, RerankingProtocol
from lightning_dalle.evaluation.statistics import mean, mean_of_proportions, proportion
from lightning_dalle.images import captioned_grid, to_pil
from lightning_dalle.inference.pipeline import Request, TextToImage
from lightning_dalle.inference.rerank import expected_best_of_n, score_candidates
from lightning_dalle.inference.scorers import fingerprint
from lightning_dalle.models.clip import CLIP
from lightning_dalle.models.dvae import DVAE
from lightning_dalle.progress import progress_bar


class Emoji:
    """Captioned emoji of all splits of OpenMoji at one image size: images in [0, 1], captions and skin tones."""

    def __init__(self, image_size: int) -> None:
        self.splits = OpenMoji().load(image_size)
        self.rows: Dataset = concatenate_datasets(list(self.splits.values()))
        self.split_of = [name for name, split in self.splits.items() for _ in range(len(split))]
        self.images: Float[Tensor, "n 3 h w"] = torch.stack(
            [to_image(image, image_size) for image in self.rows["image"]]
        )
        self.image_hash = self.rows["image_hash"][:]
        self.tones = self.rows["tones"][:]
        self.captions = [captions[0] for captions in self.rows["captions"]]

    @cached_property
    def nearest(self) -> NearestImages:
        """Search for the emoji nearest to an image, among the emoji of all splits."""
        return NearestImages(self.images)

    def indices(self, split: str) -> list[int]:
        """Return the indices, among all emoji, of the emoji in a split."""
        return [i for i, name in enumerate(self.split_of) if name == split]

    def choose(self, split: str, captions: Captions) -> list[int]:
        """Return the indices of the emoji that a protocol's captions describe, in the order of the captions."""
        rows, indices = self.splits[split], self.indices(split)
        found = zero_shot.reference_index(rows, zero_shot.choose_captions(rows, captions))
        return [indices[i] for i in found if i is not None]

    def is_right(self, samples: Float[Tensor, "n 3 h w"], prompted: list[int]) -> dict[str, list[bool]]:
        """Return whether each sample's nearest emoji is the prompted emoji, and whether their skin tones agree."""
        pairs = list(zip(self.nearest(samples).tolist(), prompted, strict=True))
        return {
            "right_emoji": [self.image_hash[i] == self.image_hash[j] for i, j in pairs],
            "right_skin_tone": [self.tones[i] == self.tones[j] for i, j in pairs],
        }

    def accuracy(self, samples: Float[Tensor, "n 3 h w"], prompted: list[int]) -> dict[str, Any]:
        """Return the proportions of samples with the right emoji and with the right skin tone, as in `is_right`."""
        return {name: proportion(sum(hits), len(hits)) for name, hits in self.is_right(samples, prompted).items()}


def measure_dvae(dvae: DVAE, emoji: Emoji) -> dict[str, Any]:
    """Return PSNR, retrieval and codebook use of a dVAE on OpenMoji's split `val`, beside a k-means codebook.

    A reconstruction from argmax codes counts as retrieved if the emoji nearest in pixels has the same image as the
    original. The accuracy of reconstructed `compositions` bounds what a DALL-E can reach with this dVAE.
    """
    val, compositions = emoji.indices("val"), emoji.indices("compositions")
    originals = emoji.images[val]
    device = next(dvae.parameters()).device

    def reconstruct(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            codes = torch.cat([dvae.encode(part.to(device)) for part in images.split(64)])
            return codes, torch.cat([dvae.decode(part) for part in codes.split(64)]).cpu()

    def quality(reconstructions: Tensor) -> dict[str, Any]:
        return {
            "psnr_db": psnr((reconstructions - originals).square().mean((1, 2, 3)).tolist()),
            "retrieval": emoji.accuracy(reconstructions, val)["right_emoji"],
        }

    codes, reconstructions = reconstruct(originals)
    perplexity = CodebookPerplexity(dvae.config.codebook_size)
    perplexity.update(codes.cpu())
    patches = kmeans_reconstructions(
        emoji.images[emoji.indices("train")], originals, dvae.config.downsampling, dvae.config.codebook_size
    )
    return {
        "protocol": {
            "data": "OpenMoji, split val",
            "images": len(val),
            "image_size": dvae.config.image_size,
            "grid": dvae.config.grid,
            "codebook_size": dvae.config.codebook_size,
            "codes": "argmax",
            "psnr": "of the mean squared error over all pixels of all images in [0, 1]",
            "retrieval": _nearest_of(emoji),
            "kmeans": "faiss, k-means++, fitted to 100,000 random training patches, 50 iterations",
        },
        "dvae": {
            **quality(reconstructions),
            "codebook_perplexity": round(float(perplexity.compute()), 1),
            "codes_used": dvae.config.codebook_size - int(perplexity.num_unused),
            "compositions": emoji.accuracy(reconstruct(emoji.images[compositions])[1], compositions),
        },
        "kmeans": quality(patches),
    }


def measure_dalle(
    pipeline: TextToImage, emoji: Emoji, protocol: Protocol, folder: Path
) -> tuple[dict[str, Any], list[int], list[Image.Image]]:
    """Generate samples of the protocol's captions, and return the accuracy of their nearest emoji.

    Args:
        pipeline: DALL-E and dVAE that generate the samples.
        emoji: emoji at the model's image size.
        protocol: settings of captions and sampling, with a single candidate for each caption.
        folder: folder for the samples; existing samples are kept.

    Returns:
        figures, the index of each sample's prompted emoji, and the samples.
    """
    generation = protocol.generation
    prompts = zero_shot.choose_captions(emoji.splits[generation.split], generation.captions)
    zero_shot.generate_samples(pipeline, prompts, generation, {1: folder})
    chosen = emoji.choose(generation.split, generation.captions)
    prompted = [i for i in chosen for _ in range(generation.samples_per_caption)]
    samples = zero_shot.first_samples(folder, len(prompted))
    images = torch.stack([to_image(sample, sample.width) for sample in samples])
    figures = {
        "protocol": {"data": "OpenMoji", **asdict(protocol), "right": _nearest_of(emoji)},
        **emoji.accuracy(images, prompted),
    }
    return figures, prompted, samples


def measure_fidelity(folder: Path, emoji: Emoji, protocol: Protocol, device: torch.device) -> dict[str, Any] | None:
    """Return the figures of `fidelity`, without blur, for the samples that `measure_dalle` wrote into a folder.

    Return None if this machine has no Inception weights: a report must not need a download.
    """
    weights = find_local_weights()
    if weights is None:
        return None
    inception, rows = Inception(weights).to(device), emoji.splits[protocol.generation.split]
    extractor = FeatureExtractor(inception, replace(protocol, blur_radii=(0,)))
    count = len(list(folder.glob("*.png")))
    measured = zero_shot.measure_samples({1: folder}, count, rows, "OpenMoji", extractor)
    return {
        **measured["by_candidates"]["1"]["by_blur_radius"]["0"],
        "inception": {"file": weights.name, "sha256": inception.sha256},
    }


def measure_clip(clip: CLIP, emoji: Emoji, count: int = 200) -> dict[str, Any]:
    """Return a CLIP's recall at 1 and 5 from image to caption and back, among `count` images of the split `val`."""
    val = emoji.indices("val")[:count]
    recall = RetrievalRecall()
    with torch.inference_mode():
        recall.update(
            clip.embed_images(emoji.images[val].to(clip.mean.device)),
            clip.embed_texts([emoji.captions[i] for i in val]),
        )
    return {
        "protocol": {"data": "OpenMoji, split val", "images": len(val), "ties": "count against"},
        **{name: proportion(round(float(value) * len(val)), len(val)) for name, value in recall.compute().items()},
    }


def measure_reranking(
    pipeline: TextToImage, emoji: Emoji, protocol: RerankingProtocol, seed: int = 0, batch_size: int = 512
) -> dict[str, Any]:
    """Return the expected accuracy and score of the best of n candidates, for several n (paper, Fig. 9c).

    Each figure averages over all n-subsets of a caption's candidates, then over the captions.
    """
    prompted = emoji.choose("compositions", Captions(one_per_image=True, count=protocol.prompts, seed=seed))
    most = protocol.candidates[-1]
    requests = [Request(emoji.captions[i], seed + n * most + j) for n, i in enumerate(prompted) for j in range(most)]
    expected: dict[int, dict[str, list[float]]] = {n: {} for n in protocol.candidates}
    with progress_bar("Sampling candidates") as on_progress:
        images = pipeline.sample_images(requests, protocol.sampling, batch_size=batch_size, on_progress=on_progress)
        for i in prompted:
            own = itertools.islice(images, most)
            candidates = list(score_candidates(own, emoji.captions[i], pipeline.scorer, batch_size))
            scores = [candidate.score or 0.0 for candidate in candidates]
            samples = torch.stack([candidate.image for candidate in candidates]).cpu()
            measured: dict[str, Sequence[float | bool]] = {**emoji.is_right(samples, [i] * most), "score": scores}
            for n, figures in expected.items():
                for name, values in measured.items():
                    figures.setdefault(name, []).append(expected_best_of_n(values, scores, n))
    return {
        "protocol": {
            "data": "OpenMoji, split compositions",
            "prompts": len(prompted),
            "ranked_by": fingerprint(pipeline.scorer),
            "best_of": f"mean over all n-subsets of the {most} candidates of a caption",
            "sampling": asdict(protocol.sampling),
            "seed": seed,
        },
        "by_candidates": {
            str(n): {
                name: mean(values) if name == "score" else mean_of_proportions(values, trials=most / n)
                for name, values in figures.items()
            }
            for n, figures in expected.items()
        },
    }


def image_grid(emoji: Emoji, prompted: list[int], samples: list[Image.Image], most: int = 40) -> Image.Image:
    """Return a grid of captioned pairs: a sample on the left, its prompted emoji on the right; at most `most` pairs."""
    rows = [[sample, to_pil(emoji.images[i])] for i, sample in zip(prompted[:most], samples, strict=False)]
    return captioned_grid(rows, [emoji.captions[i] for i in prompted[:most]], columns=8, side=80)


def _nearest_of(emoji: Emoji) -> str:
    return f"nearest in Euclidean distance of pixels among all {len(emoji.images)} captioned emoji"
