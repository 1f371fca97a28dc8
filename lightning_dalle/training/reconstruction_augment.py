"""Augmentation of CLIP's training images by reconstructions of a dVAE."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lightning_dalle.checkpoints import load_dvae
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.metrics import NearestImages
from lightning_dalle.models.dvae import DVAE, gumbel_noise


@dataclass(kw_only=True)
class ReconstructionAugment:
    """Replacement of some images of a batch by dVAE reconstructions, which resemble the candidates that CLIP ranks.

    The codes of a reconstruction are sampled from the encoder's distribution. The reconstruction replaces the image of
    the batch that is nearest to it in pixels, and thereby gets the caption that fits it best.

    A CLIP trained only on real images scores the artefacts of a dVAE too highly. The paper's CLIP was trained elsewhere
    and without this augmentation.
    """

    dvae_checkpoint: Path | str
    """Checkpoint of the dVAE, or of a DALL-E with its dVAE, that decodes the candidates."""
    fraction: float = 0.5
    """Fraction of a batch's images to reconstruct: above 0, at most 1, rounded up to whole images."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"reconstruction_augment.fraction is {self.fraction}, but must be above 0 and at most 1")

    @cached_property
    def dvae(self) -> DVAE:
        """Frozen dVAE in eval mode."""
        return load_dvae(self.dvae_checkpoint).requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b 3 h w"], generator: Generator) -> Float[Tensor, "b 3 h w"]:
        """Return the images in [0, 1] with some of them replaced by reconstructions."""
        dvae = self.dvae.to(images.device)
        order = torch.randperm(len(images), generator=generator, device=images.device)
        chosen = order[: math.ceil(self.fraction * len(images))]
        logits = dvae.encoder_logits(images[chosen])  # (n, k, g, g)
        reconstructed = dvae.decode((logits + gumbel_noise(logits, generator)).argmax(dim=1))  # (n, 3, h, w)
        is_nearest = NearestImages(images)(reconstructed) == torch.arange(len(images), device=images.device)[:, None]
        replacement = reconstructed[is_nearest.byte().argmax(dim=1)]  # (b, 3, h, w)
        return torch.where(is_nearest.any(dim=1)[:, None, None, None], replacement, images)
