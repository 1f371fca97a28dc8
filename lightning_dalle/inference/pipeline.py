"""Text-to-image pipeline, which commands, callbacks, evaluation and notebooks share."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from lightning_dalle.checkpoints import check_dvae, find_in_folder, load_dalle, load_dvae
from lightning_dalle.data.images.transforms import to_image
from lightning_dalle.errors import UserError
from lightning_dalle.images import to_pil
from lightning_dalle.inference.config import GenerationConfig, SamplingConfig, check_candidates, list_prompts
from lightning_dalle.inference.rerank import rerank, score_candidates
from lightning_dalle.inference.sampling import sample_codes, to_native_bf16
from lightning_dalle.inference.scorers import CLIPScorer, Scorer
from lightning_dalle.models.dalle import DALLE
from lightning_dalle.models.dvae import DVAE
from lightning_dalle.progress import OnProgress, no_progress
from lightning_dalle.tokenizer import CaptionTokenizer


class Request(NamedTuple):
    """Prompt and seed of one image to sample; equal requests give equal images in batches of any size."""

    prompt: str
    seed: int


class GeneratedImage(NamedTuple):
    """Image generated for a prompt."""

    image: Image.Image
    seed: int
    """Seed that gives this image again for the same prompt."""
    score: float | None
    """Score by the pipeline's scorer, higher is better; None without a scorer."""


class ImagePrompt(NamedTuple):
    """Upper part of an image, which the model completes."""

    codes: Int[Tensor, " n"]
    """Codes of whole rows of the grid, in raster order."""
    pixels: Float[Tensor, "3 r w"]
    """Pixels in [0, 1] of the same rows."""
    paste: bool = False
    """Whether `pixels` replace their reconstruction by the dVAE in the generated images."""


@dataclass(eq=False, repr=False)
class TextToImage:
    """Pipeline of a DALL-E with its dVAE and tokenizer, in eval mode on one device, and a scorer of the images."""

    dalle: DALLE
    dvae: DVAE
    tokenizer: CaptionTokenizer
    attribution: str | None = None
    """Credit line that the licence of the training images requires on generated images."""
    scorer: Scorer | None = None
    """Model that ranks candidates by how well they fit the prompt; None keeps the order of their seeds."""

    @classmethod
    def from_pretrained(cls, path: Path | str, dvae: Path | str | None = None) -> "TextToImage":
        """Load a DALL-E, and the CLIP that was trained or exported with it as the scorer.

        Args:
            path: checkpoint of a DALL-E, or folder that `reproduce` or `export` wrote; only folders have a CLIP.
            dvae: checkpoint or folder with another dVAE of the same grid and codebook size, to decode with.

        Raises:
            UserError: if a file is missing or has another kind of model, or the dVAE does not fit the DALL-E.
        """
        loaded, clip = load_dalle(path), find_in_folder(path, "clip")
        if dvae is not None:
            other, ours = load_dvae(dvae), loaded.dalle.config
            check_dvae("the transformer", other, Path(dvae), grid=ours.grid, codebook_size=ours.codebook_size)
            loaded = loaded._replace(dvae=other)
        return cls(*loaded, scorer=None if clip is None else CLIPScorer.from_checkpoint(clip))

    @property
    def device(self) -> torch.device:
        """Device of the models."""
        return self.dalle.start.device

    def to(self, device: torch.device | str) -> "TextToImage":
        """Move the models to a device, and return the pipeline itself."""
        for model in (self.dalle, self.dvae, self.scorer):
            if isinstance(model, torch.nn.Module):
                model.to(device)
        return self

    def tokenize(self, prompts: str | Sequence[str]) -> Int[Tensor, "b t"]:
        """Return the padded tokens of prompts, none of them empty; a long prompt is truncated with a warning."""
        ids = [self.tokenizer.pad(self.tokenizer.encode(prompt))[0] for prompt in list_prompts(prompts)]
        return torch.tensor(ids, device=self.device)

    @torch.no_grad()
    def image_prompt(self, image: Image.Image, rows: int | None = None, paste: bool = False) -> ImagePrompt:
        """Return the upper part of an image as a prompt, after it is cropped and resized to the dVAE's image size.

        Args:
            image: image of any size.
            rows: number of rows of codes to keep; by default 15 of 32, as in Fig. 14.
            paste: whether generated images get the original pixels of these rows.

        Raises:
            UserError: if no row, or every row, of the grid is kept.
        """
        config = self.dvae.config
        rows = max(1, 15 * config.grid // 32) if rows is None else rows
        if not 0 < rows < config.grid:
            raise UserError(f"cannot keep {rows} rows of a grid of {config.grid}: rows must be 1 to {config.grid - 1}")
        pixels = to_image(image, config.image_size)
        codes = self.dvae.encode(pixels[None].to(self.device))[0, :rows].flatten()
        return ImagePrompt(codes, pixels[:, : rows * config.downsampling], paste)

    def __call__(
        self,
        prompt: str | Sequence[str],
        config: GenerationConfig = GenerationConfig(),  # noqa: B008 (frozen)
        image_prompt: ImagePrompt | None = None,
        on_progress: OnProgress = no_progress,
        **changes: Any,
    ) -> list[GeneratedImage]:
        """Generate images of one prompt, best first, or of several prompts one after the other.

        Args:
            prompt: text to draw, or several texts.
            config: number of candidates, seed and other settings.
            image_prompt: upper part of the images, from `image_prompt`.
            on_progress: callback with the number of codes sampled and the total.
            **changes: fields of `config` or of its `sampling` to replace, such as num_candidates=64, temperature=0.5.

        Raises:
            UserError: if a prompt is empty, a field is unknown, or fewer images are kept than sampled without a scorer.
        """
        return list(itertools.chain.from_iterable(self.generate(prompt, config, image_prompt, on_progress, **changes)))

    def generate(
        self,
        prompts: str | Sequence[str],
        config: GenerationConfig = GenerationConfig(),  # noqa: B008 (frozen)
        image_prompt: ImagePrompt | None = None,
        on_progress: OnProgress = no_progress,
        **changes: Any,
    ) -> Iterator[list[GeneratedImage]]:
        """Yield the images of each prompt, best first; prompt n, from 0, has seeds from seed + n * num_candidates."""
        prompts, config = list_prompts(prompts), config.replace(**changes)
        num_candidates, seed = config.num_candidates, config.seed
        check_candidates(num_candidates, config.num_kept, self.scorer is not None)
        repeated = [prompt for prompt in prompts for _ in range(num_candidates)]
        requests = [Request(prompt, seed + i) for i, prompt in enumerate(repeated)]
        prefix = None if image_prompt is None else image_prompt.codes
        images = self.sample_images(requests, config.sampling, prefix, config.batch_size, on_progress)
        if image_prompt is not None and image_prompt.paste:
            upper = image_prompt.pixels
            images = (torch.cat([upper.to(image.device), image[:, upper.shape[1] :]], dim=1) for image in images)
        for n, prompt in enumerate(prompts):
            candidates = itertools.islice(images, num_candidates)
            best = rerank(score_candidates(candidates, prompt, self.scorer, config.batch_size), config.num_kept)
            yield [GeneratedImage(to_pil(c.image), seed + n * num_candidates + c.number, c.score) for c in best]

    @torch.no_grad()
    def sample_images(
        self,
        requests: str | Sequence[Request],
        sampling: SamplingConfig,
        prefix: Int[Tensor, " n"] | None = None,
        batch_size: int = 64,
        on_progress: OnProgress = no_progress,
    ) -> Iterator[Float[Tensor, "3 h w"]]:
        """Yield one image in [0, 1] for each request, in order.

        Args:
            requests: prompts and seeds, or one prompt with the seed 0.
            sampling: settings that turn logits into codes.
            prefix: first codes of every image, as in `ImagePrompt`.
            batch_size: number of images sampled at once.
            on_progress: callback with the number of codes sampled and the total.
        """
        requests = [Request(requests, seed=0)] if isinstance(requests, str) else requests
        tokens = self.tokenize([request.prompt for request in requests])
        dalle = to_native_bf16(self.dalle)
        num_codes = self.dalle.config.image_len - (0 if prefix is None else len(prefix))
        total, done = len(requests) * num_codes, 0
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]

            def on_code(size: int = len(batch)) -> None:
                nonlocal done
                done += size
                on_progress(done, total)

            codes = sample_codes(
                dalle,
                tokens[start : start + batch_size],
                [request.seed for request in batch],
                sampling,
                None if prefix is None else prefix.expand(len(batch), -1),
                on_code,
            )
            for one in codes:  # alone, since the last bits of a convolution depend on its batch on some CPUs
                yield self.dvae.decode(one[None])[0]
