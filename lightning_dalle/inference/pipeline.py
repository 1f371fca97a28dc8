"""Captions to pictures: the one path that callbacks, commands and notebooks use.

Knows models, a tokenizer and pixels. Knows nothing of training.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from lightning_dalle.checkpoints import check_fit, load_dalle, load_dvae
from lightning_dalle.data.images.transforms import to_image
from lightning_dalle.errors import UserError
from lightning_dalle.images import to_pil
from lightning_dalle.inference.config import SamplingOptions
from lightning_dalle.inference.rerank import best_first, scored
from lightning_dalle.inference.sampling import in_native_bf16, sample
from lightning_dalle.inference.scorers import Scorer, TrainedCLIP
from lightning_dalle.models.dalle import DALLE
from lightning_dalle.models.dvae import DVAE
from lightning_dalle.tokenizer import CaptionTokenizer


class Request(NamedTuple):
    """One picture to make."""

    prompt: str
    seed: int


class Picture(NamedTuple):
    """One picture that was made."""

    image: Image.Image
    seed: int
    """The same prompt and seed make it again."""
    score: float | None
    """How well it fits its prompt, if there is a scorer; higher is better."""


class Given(NamedTuple):
    """The upper part of a picture that is to be completed."""

    codes: Int[Tensor, " n"]
    """Of whole rows of the grid."""
    pixels: Float[Tensor, "3 r w"]
    """In [0, 1], of the same rows."""


class TextToImage:
    """A DALL-E, its dVAE and its tokenizer, in eval mode on one device, and what ranks its candidates.

    Args:
        dalle: the transformer.
        dvae: decodes the codes that the transformer was trained on.
        tokenizer: the one that the transformer was trained with.
        attribution: what the licence of the training pictures asks of what is made from them.
        scorer: ranks candidates; None leaves them in the order of their seeds.
    """

    def __init__(
        self,
        dalle: DALLE,
        dvae: DVAE,
        tokenizer: CaptionTokenizer,
        attribution: str | None = None,
        scorer: Scorer | None = None,
    ) -> None:
        self.dalle, self.dvae, self.tokenizer = dalle, dvae, tokenizer
        self.attribution, self.scorer = attribution, scorer

    @classmethod
    def from_pretrained(cls, path: Path | str, dvae: Path | None = None) -> "TextToImage":
        """Opens a DALL-E, with another dVAE of the same grid and codebook if one is given.

        Args:
            path: its checkpoint, or the folder of a recipe's run or of what `export` wrote, whose CLIP then ranks the
                candidates.
            dvae: checkpoint of a dVAE.

        Raises:
            UserError: if a file is missing or of the wrong kind, or the two do not fit.
        """
        checkpoint, clip = files_of(Path(path))
        loaded = load_dalle(checkpoint)
        if dvae is not None:
            other = load_dvae(dvae)
            check_fit(loaded.dalle, other, dvae)
            loaded = loaded._replace(dvae=other)
        return cls(*loaded, scorer=None if clip is None else TrainedCLIP(clip))

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.dalle.start.device

    def to(self, device: torch.device | str) -> "TextToImage":
        """Moves the models, and returns itself."""
        for model in (self.dalle, self.dvae, self.scorer):
            if isinstance(model, torch.nn.Module):
                model.to(device)
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

    def given(self, image: Image.Image, rows: int | None = None) -> Given:
        """The upper rows of any picture, cut to its middle square; 15 of 32 rows if not said, as in Fig. 14.

        Raises:
            UserError: if no row is left to complete.
        """
        grid = self.dvae.config.grid
        rows = max(1, 15 * grid // 32) if rows is None else rows
        pixels = to_image(image, self.dvae.config.image_size)
        return Given(self.top_rows(pixels, rows), pixels[:, : rows * self.dvae.config.downsampling])

    def __call__(
        self,
        prompt: str,
        num_candidates: int = 1,
        top: int | None = None,
        seed: int = 0,
        options: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
        given: Given | None = None,
        paste: bool = False,
        batch_size: int = 64,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Picture]:
        """The best pictures of a prompt, best first: of the seeds from `seed` on, a candidate for each.

        Args:
            prompt: what to draw.
            num_candidates: pictures that are made.
            top: pictures that are kept, all if not said; fewer need a scorer.
            seed: of the first candidate.
            options: how codes are drawn.
            given: what every picture begins with, from `given`.
            paste: puts the pixels of what is given back, in place of the dVAE's reconstruction of them.
            batch_size: pictures made at once.
            on_progress: told how many codes of how many are drawn.

        Raises:
            UserError: if the prompt is empty, or some candidates are to be kept without a scorer to choose them.
        """
        (made,) = self.pictures([prompt], num_candidates, top, seed, options, given, paste, batch_size, on_progress)
        return made

    def pictures(
        self,
        prompts: list[str],
        num_candidates: int = 1,
        top: int | None = None,
        seed: int = 0,
        options: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
        given: Given | None = None,
        paste: bool = False,
        batch_size: int = 64,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[list[Picture]]:
        """The same of several prompts in turn, the n-th with the seeds from `seed + n * num_candidates` on."""
        top = num_candidates if top is None else top
        check_candidates(num_candidates, top, self.scorer)
        each = [prompt for prompt in prompts for _ in range(num_candidates)]
        requests = [Request(prompt, seed + i) for i, prompt in enumerate(each)]
        codes = None if given is None else given.codes
        images = self.draw(requests, options, codes, batch_size, on_progress)
        if given is not None and paste:
            rest = slice(given.pixels.shape[1], None)
            images = (torch.cat([given.pixels.to(image.device), image[:, rest]], dim=1) for image in images)
        for n, prompt in enumerate(prompts):
            mine = itertools.islice(images, num_candidates)
            best = best_first(scored(mine, prompt, self.scorer, batch_size), top)
            yield [Picture(to_pil(c.image), seed + n * num_candidates + c.number, c.score) for c in best]

    @torch.no_grad()
    def draw(
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
        dalle = in_native_bf16(self.dalle)
        todo, done = len(requests) * (self.dalle.config.image_len - begun), 0
        for start in range(0, len(requests), batch_size):
            part = requests[start : start + batch_size]

            def on_code(size: int = len(part)) -> None:
                nonlocal done
                done += size
                on_progress(done, todo)

            codes = sample(
                dalle,
                tokens[start : start + batch_size],
                [request.seed for request in part],
                options,
                None if given is None else given.expand(len(part), -1),
                on_code,
            )
            for one in codes:  # alone, since the last bits of a convolution depend on its batch on some CPUs
                yield self.dvae.decode(one[None])[0]


def check_candidates(num_candidates: int, top: int, scorer: Scorer | None) -> None:
    """Raises a UserError if some candidates are to be kept, and nothing can tell which."""
    if num_candidates < 1 or not 1 <= top <= num_candidates:
        raise UserError(f"of {num_candidates} candidates {top} are to be kept, but it must be from 1 to all of them")
    if top < num_candidates and scorer is None:
        raise UserError(
            f"the best {top} of {num_candidates} candidates are to be kept, but there is no CLIP to rank them"
        )


def files_of(path: Path) -> tuple[Path, Path | None]:
    """The files of a DALL-E and, if there is one, of the CLIP beside it.

    Args:
        path: a checkpoint, which has none, or the folder of a recipe's run or of what `export` wrote.

    Raises:
        UserError: if the folder is neither.
    """
    if not path.is_dir() or (path / ".metadata").is_file():
        return path, None  # the latter is a checkpoint in parts, and who reads it says how they become one file
    layouts = ("{}/checkpoints/last.ckpt", "{}.safetensors")
    for layout in layouts:
        dalle, clip = (path / layout.format(model) for model in ("dalle", "clip"))
        if dalle.is_file():
            return dalle, clip if clip.is_file() else None
    sought = " nor ".join(layout.format("dalle") for layout in layouts)
    raise UserError(f"{path} is neither a recipe's run nor a release with a DALL-E: it holds neither {sought}")
