"""Settings of evaluations; this module does not import torch, so that `evaluate --help` starts quickly."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning_dalle.errors import UserError
from lightning_dalle.inference.config import SamplingConfig, check_candidates


def check_at_least(least: int, **values: int | None) -> None:
    """Raise a UserError that names the first value below `least`; None is accepted."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{name} is {value}, but must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """Resizing of generated and reference images before Inception."""

    image_size: int | None = 256
    """Side of the resized images in pixels; null keeps their size, which must then be equal for all images."""
    resize: Literal["torchvision", "clean-fid"] = "torchvision"
    """Resizing method. torchvision: the shorter side to `image_size`, bilinear with antialias, then a center crop;
    Inception itself resizes that to 299 as TensorFlow 1 did. clean-fid: the whole image to 299 x 299, bicubic with
    antialias (Parmar et al. 2022; here rounded to 8 bits); `image_size` has no effect."""


@dataclass(frozen=True, kw_only=True)
class FidelityConfig:
    """Settings of FID, KID, precision, recall and the Inception Score; the defaults are torch-fidelity's."""

    kid_subsets: int = 100
    """Number of random subsets that KID averages over."""
    kid_subset_size: int = 1000
    """Number of images in a subset of KID. It is cut to half of the smaller set of images, so that subsets differ."""
    isc_splits: int = 10
    """Number of parts of the generated images that the Inception Score averages over (Salimans et al. 2016)."""
    neighbours: int = 3
    """Number k of nearest neighbours in precision and recall (Kynkaanniemi et al. 2019)."""
    bootstrap: int = 0
    """Number of bootstrap resamples of generated and reference images for the standard deviation of FID; 0 omits it.
    Each resample takes as long as FID itself: seconds, on a CPU up to a minute."""
    seed: int = 2020
    """Seed of KID's subsets, the Inception Score's split, the bootstrap and the choice of `reference_count` images."""

    def __post_init__(self) -> None:
        check_at_least(0, bootstrap=self.bootstrap)
        check_at_least(1, kid_subsets=self.kid_subsets, isc_splits=self.isc_splits, neighbours=self.neighbours)
        check_at_least(2, kid_subset_size=self.kid_subset_size)


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Settings that choose the captions for which images are generated."""

    csv: Path | None = None
    """CSV file of captions, with the columns image_id and prompt; null takes the captions of the dataset's split."""
    one_per_image: bool = False
    """Whether to use one random caption of each image instead of all its captions."""
    unique: bool = True
    """Whether to use a caption only once if several images have it (the paper's choice for CUB)."""
    count: int | None = None
    """Number of captions to sample, in random order (30,000 for COCO in the paper); null for all, in order."""
    seed: int = 0
    """Seed of the random choice and order of captions."""

    def __post_init__(self) -> None:
        check_at_least(1, **{"captions.count": self.count})


@dataclass(frozen=True, kw_only=True)
class GenerationProtocol:
    """Settings of generated images: captions, number of candidates, sampling and seed."""

    split: str = "val"
    """Split of the data that captions and reference images are taken from."""
    captions: Captions = field(default_factory=Captions)
    """Captions for which images are generated."""
    samples_per_caption: int = 1
    """Number of images saved for each caption, each the best of its own candidates."""
    candidates: tuple[int, ...] = (1,)
    """Increasing numbers n; the best of the first n candidates is saved for each n (Fig. 9c: 1 to 512). The largest n
    is the number of candidates sampled for each image."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Settings of sampling, such as the temperature."""
    seed: int = 0
    """Seed of the first candidate of the first caption; each further candidate has the next integer."""

    def __post_init__(self) -> None:
        check_candidates(self.candidates)
        check_at_least(1, samples_per_caption=self.samples_per_caption)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Settings of an evaluation: all that figures depend on besides the images. Each result file includes them."""

    name: str
    """Name of the protocol, which is part of the names of result files."""
    preprocessing: ImagePreprocessing = field(default_factory=ImagePreprocessing)
    """Resizing of generated and reference images."""
    blur_radii: tuple[int, ...] = (0,)
    """Standard deviations, in pixels, of the Gaussian blur of all images; 0 means no blur (Fig. 9a and b)."""
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    """Settings of FID, KID, precision, recall and the Inception Score."""
    reference: Literal["split", "captions"] = "split"
    """Choice of reference images. split: all images of the split. captions: the images of the chosen captions."""
    reference_count: int | None = None
    """Number of reference images, chosen at random from the split; null for all."""
    generation: GenerationProtocol = field(default_factory=GenerationProtocol)
    """Settings of generated images; the subcommand `evaluate`, which compares two folders, ignores them."""

    def __post_init__(self) -> None:
        if not self.blur_radii or min(self.blur_radii) < 0:
            raise UserError(f"blur_radii is {list(self.blur_radii)}, but must list one or more integers from 0 on")
        check_at_least(1, reference_count=self.reference_count)
        if self.reference == "captions" and self.reference_count is not None:
            raise UserError(
                f"reference_count is {self.reference_count}, but `reference: captions` uses the image of each chosen "
                "caption: remove one of the two keys"
            )


@dataclass(frozen=True, kw_only=True)
class RerankingProtocol:
    """Settings that measure how much reranking n candidates improves samples, for several n."""

    prompts: int = 200
    """Number of captions that candidates are sampled for."""
    candidates: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Increasing numbers n; the last is the number of candidates sampled for each caption (Fig. 9c)."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Settings of sampling; a higher temperature than for single samples makes candidates differ."""

    def __post_init__(self) -> None:
        check_candidates(self.candidates)
        check_at_least(1, prompts=self.prompts)
