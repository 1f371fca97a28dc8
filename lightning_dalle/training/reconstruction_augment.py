"""Pictures as a DALL-E will draw them, in the place of real ones: what a CLIP that ranks candidates is trained on.

Knows a frozen dVAE and a batch of images. Knows nothing of captions or of the CLIP.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from lightning_dalle.checkpoints import load_dvae
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.metrics import Nearest
from lightning_dalle.models.dvae import DVAE, gumbel_noise


@dataclass(kw_only=True)
class StandIns:
    """Reconstructions from codes drawn by the encoder's distribution, each in the place of that image of the batch
    which it is nearest to.

    A CLIP that has seen real pictures alone is pleased by the flaws of a dVAE; and what a dVAE blurs into another
    picture has to count as that one. Not in the paper, whose CLIP was trained elsewhere.
    """

    dvae_checkpoint: Path
    """The dVAE that decodes the candidates: a dVAE's checkpoint, or a DALL-E's."""
    share: float = 0.5
    """Of the batch, how many images are reconstructed, rounded up; above 0, at most 1."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"the share of stand-ins is {self.share}, but must be above 0 and at most 1")

    @cached_property
    def dvae(self) -> DVAE:
        """In eval mode, without gradients."""
        return load_dvae(self.dvae_checkpoint).requires_grad_(False).to(memory_format=torch.channels_last)

    def check(self, image_size: int) -> None:
        """Raises a UserError if the dVAE reads images of another size, in pixels."""
        if self.dvae.config.image_size != image_size:
            raise UserError(
                f"the data's image_size is {image_size}, but the dVAE in {self.dvae_checkpoint} was trained with "
                f"image_size={self.dvae.config.image_size}"
            )

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b 3 h w"], generator: Generator) -> Float[Tensor, "b 3 h w"]:
        """The images in [0, 1], some of them replaced; under autocast the dVAE computes in its precision."""
        dvae = self.dvae.to(images.device)
        order = torch.randperm(len(images), generator=generator, device=images.device)
        drawn = order[: math.ceil(self.share * len(images))]
        logits = dvae.encoder_logits(images[drawn])  # (n, k, g, g)
        made = dvae.decode((logits + gumbel_noise(logits, generator)).argmax(dim=1))  # (n, 3, h, w)
        is_of = Nearest(images)(made) == torch.arange(len(images), device=images.device)[:, None]  # (b, n)
        return torch.where(is_of.any(dim=1)[:, None, None, None], made[is_of.byte().argmax(dim=1)], images)
