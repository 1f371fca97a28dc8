"""Captions to pictures: the one path that callbacks, commands and notebooks use.

Knows models, a tokenizer and pixels. Knows nothing of training.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_dalle.checkpoints import check_fit, load_dalle, load_dvae
from lightning_dalle.errors import UserError
from lightning_dalle.inference.options import SamplingOptions
from lightning_dalle.inference.sampling import sample
from lightning_dalle.models.dalle import DALLE
from lightning_dalle.models.dvae import DVAE
from lightning_dalle.tokenizer import CaptionTokenizer


class Request(NamedTuple):
    """One picture to make."""

    prompt: str
    seed: int


class TextToImage:
    """A DALL-E, its dVAE and its tokenizer, in eval mode on one device.

    Args:
        dalle: the transformer.
        dvae: decodes the codes that the transformer was trained on.
        tokenizer: the one that the transformer was trained with.
        attribution: what the licence of the training pictures asks of what is made from them.
    """

    def __init__(self, dalle: DALLE, dvae: DVAE, tokenizer: CaptionTokenizer, attribution: str | None = None) -> None:
        self.dalle, self.dvae, self.tokenizer, self.attribution = dalle, dvae, tokenizer, attribution

    @classmethod
    def from_checkpoint(cls, path: Path, dvae: Path | None = None) -> "TextToImage":
        """Opens a DALL-E checkpoint, with another dVAE of the same grid and codebook if one is given.

        Raises:
            UserError: if a file is missing or of the wrong kind, or the two do not fit.
        """
        loaded = load_dalle(path)
        if dvae is None:
            return cls(*loaded)
        other = load_dvae(dvae)
        check_fit(loaded.dalle, other, dvae)
        return cls(*loaded._replace(dvae=other))

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.dalle.start.device

    def to(self, device: torch.device | str) -> "TextToImage":
        """Moves the models, and returns itself."""
        self.dalle.to(device)
        self.dvae.to(device)
        return self

    def tokens(self, prompts: list[str]) -> Int[Tensor, "b t"]:
        """Prompts as the transformer reads them; a long one is cut, with a warning.

        Raises:
            UserError: if a prompt is empty.
        """
        for i, prompt in enumerate(prompts):
            if not prompt.strip():
                raise UserError(f"prompt {i + 1} of {len(prompts)} is empty")
        ids = [self.tokenizer.pad(self.tokenizer.encode(prompt))[0] for prompt in prompts]
        return torch.tensor(ids, device=self.device)

    @torch.no_grad()
    def top_rows(self, image: Float[Tensor, "3 h w"], rows: int) -> Int[Tensor, " n"]:
        """Codes of the upper rows of an image in [0, 1], to be completed.

        Raises:
            UserError: if the image is of another size than the dVAE's, or no row is left to complete.
        """
        size, grid = self.dvae.config.image_size, self.dvae.config.grid
        if image.shape[1:] != (size, size):
            raise UserError(f"the image is {image.shape[2]}x{image.shape[1]} pixels, but the dVAE reads {size}x{size}")
        if not 0 < rows < grid:
            raise UserError(f"rows to keep are {rows}, but must be from 1 to {grid - 1}, of a grid of {grid}")
        return self.dvae.encode(image[None].to(self.device))[0, :rows].flatten()

    @torch.no_grad()
    def __call__(
        self,
        requests: list[Request],
        options: SamplingOptions,
        given: Int[Tensor, " n"] | None = None,
        batch_size: int = 64,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[Float[Tensor, "3 h w"]]:
        """Yields one image in [0, 1] for each request, in order, batch by batch.

        Args:
            requests: prompts and seeds; a picture depends on its own prompt and seed, not on its neighbours.
            options: how codes are drawn.
            given: codes that every picture begins with, from `top_rows`.
            batch_size: pictures made at once.
            on_progress: told how many codes of how many are drawn.
        """
        tokens = self.tokens([request.prompt for request in requests])
        begun = 0 if given is None else len(given)
        todo, done = len(requests) * (self.dalle.config.image_len - begun), 0
        for start in range(0, len(requests), batch_size):
            part = requests[start : start + batch_size]

            def on_code(size: int = len(part)) -> None:
                nonlocal done
                done += size
                on_progress(done, todo)

            codes = sample(
                self.dalle,
                tokens[start : start + batch_size],
                [request.seed for request in part],
                options,
                None if given is None else given.expand(len(part), -1),
                on_code,
            )
            for (
                one
            ) in codes:  # alone, since the last bits of a convolution depend on the size of its batch on some CPUs
                yield self.dvae.decode(one[None])[0]
