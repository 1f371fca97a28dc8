"""The openmoji protocol: does a dVAE keep emoji apart, and does a DALL-E compose what it never saw together?

Knows the OpenMoji splits, models and measures. Knows nothing of training or of where the numbers go.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lightning_dalle.data.datamodule import image_transform
from lightning_dalle.data.openmoji import OpenMoji
from lightning_dalle.evaluation.fidelity import fidelity
from lightning_dalle.evaluation.image_sets import Pictures, read_pictures
from lightning_dalle.evaluation.inception import Inception, weights_at_hand
from lightning_dalle.evaluation.kmeans import kmeans_reconstructions
from lightning_dalle.evaluation.metrics import CodebookUse, nearest
from lightning_dalle.evaluation.protocol import FidelityOptions, Preparation
from lightning_dalle.evaluation.statistics import psnr, share
from lightning_dalle.inference.options import SamplingOptions
from lightning_dalle.inference.pipeline import Request, TextToImage
from lightning_dalle.models.dvae import DVAE
from lightning_dalle.pictures import captioned_grid, to_pil


class Emoji:
    """All captioned emoji at one size: images in [0, 1] and, beside them, what each shows."""

    def __init__(self, image_size: int) -> None:
        splits = OpenMoji().load(image_size)
        self.rows: Dataset = concatenate_datasets(list(splits.values()))
        self.split_of = [name for name, split in splits.items() for _ in range(len(split))]
        transform = image_transform(image_size)
        self.images: Float[Tensor, "n 3 h w"] = torch.stack([transform(image) for image in self.rows["image"]])
        self.picture = self.rows["picture"][:]
        self.tones = self.rows["tones"][:]
        self.captions = [captions[0] for captions in self.rows["captions"]]

    def of(self, split: str) -> list[int]:
        """Indices of a split's emoji."""
        return [i for i, name in enumerate(self.split_of) if name == split]


def measure_dvae(dvae: DVAE, emoji: Emoji) -> dict[str, Any]:
    """Reconstructions of `val` by argmax codes, beside a k-means codebook of the same grid and size.

    A reconstruction is retrieved if the nearest of all captioned emoji, in pixels, is its original (or shows the very
    same picture).
    """
    val = emoji.of("val")
    originals = emoji.images[val]
    with torch.inference_mode():
        codes = torch.cat([dvae.encode(part) for part in originals.split(64)])
        made = torch.cat([dvae.decode(part) for part in codes.split(64)])
    use = CodebookUse(dvae.config.codebook_size)
    use.update(codes)
    patches = kmeans_reconstructions(
        emoji.images[emoji.of("train")], originals, dvae.config.downsampling, dvae.config.codebook_size
    )

    def quality(reconstructions: Tensor) -> dict[str, Any]:
        found = nearest(reconstructions, emoji.images).tolist()
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
    held_out = emoji.of("compositions")
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))[:num_prompts]
    asked = [held_out[i] for i in order]
    requests = [Request(emoji.captions[i], seed + n) for n, i in enumerate(asked)]
    samples = torch.stack(list(pipeline(requests, sampling, on_progress=on_progress))).cpu()
    found = nearest(samples, emoji.images).tolist()
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
        "right_emoji": share([emoji.picture[i] == emoji.picture[j] for i, j in zip(found, asked, strict=True)]),
        "right_skin_tone": share([emoji.tones[i] == emoji.tones[j] for i, j in zip(found, asked, strict=True)]),
    }
    return numbers, asked, [to_pil(sample) for sample in samples]


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
