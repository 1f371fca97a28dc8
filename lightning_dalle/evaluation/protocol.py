"""Settings that a measured figure depends on, without torch, so that `evaluate --help` answers at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning_dalle.errors import UserError
from lightning_dalle.inference.config import SamplingConfig, check_candidates


def check_at_least(least: int, **values: int | None) -> None:
    """Raise a UserError that names the first value below `least`; None passes."""
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{name} is {value}, but must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """Resizing of images before Inception, the same for generated and reference images."""

    image_size: int | None = 256
    """Side of the images in pixels; null keeps every image as it is, and all must then have one size."""
    resize: Literal["torchvision", "clean-fid"] = "torchvision"
    """Resizing method. torchvision: the shorter side to `image_size`, bilinear with antialias, then a center crop;
    Inception itself resizes that to 299 as TensorFlow 1 did. clean-fid: the whole image to 299 x 299, bicubic with
    antialias (Parmar et al. 2022; here rounded to 8 bits), for any `image_size`."""


@dataclass(frozen=True, kw_only=True)
class FidelityConfig:
    """Settings of FID, KID, precision, recall and the Inception Score; the defaults are torch-fidelity's."""

    kid_subsets: int = 100
    """Number of random subsets that KID averages over."""
    kid_subset_size: int = 1000
    """Images in a subset; at most half of either side, so that the subsets differ."""
    isc_splits: int = 10
    """Number of parts that the Inception Score averages over (Salimans et al. 2016)."""
    neighbours: int = 3
    """Neighbour index k of precision and recall (Kynkaanniemi et al. 2019)."""
    bootstrap: int = 0
    """Number of bootstrap resamples of both sides for the standard deviation of FID; 0 for none. Each takes as long as
    FID itself: seconds, on a CPU up to a minute."""
    seed: int = 2020
    """Seed of KID's subsets, the Inception Score's split, the bootstrap and the choice of `reference_count` images."""

    def __post_init__(self) -> None:
        check_at_least(0, bootstrap=self.bootstrap)
        check_at_least(1, kid_subsets=self.kid_subsets, isc_splits=self.isc_splits, neighbours=self.neighbours)
        check_at_least(2, kid_subset_size=self.kid_subset_size)


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Choice of the captions of a split that images are generated for."""

    csv: Path | None = None
    """CSV file with the columns image_id and prompt, such as the field's 30,000 of COCO; read in order."""
    one_per_image: bool = False
    """Whether to use one random caption of each image instead of all."""
    unique: bool = True
    """Whether to use a caption that several images share only once (the paper's choice for CUB)."""
    count: int | None = None
    """Number of captions to sample, in random order (30,000 for COCO in the paper); null for all, in order."""
    seed: int = 0
    """Seed of the choice and the order."""

    def __post_init__(self) -> None:
        check_at_least(1, **{"captions.count": self.count})


@dataclass(frozen=True, kw_only=True)
class GenerationProtocol:
    """Captions, candidates and sampling of the generated images."""

    split: str = "val"
    """Split of the data that captions and reference images are taken from."""
    captions: Captions = field(default_factory=Captions)
    """Choice of the captions."""
    samples_per_caption: int = 1
    """Number of images kept of each caption, each the best of its own candidates."""
    candidates: tuple[int, ...] = (1,)
    """Increasing numbers of candidates, each of which the best is kept (Fig. 9c: 1 to 512). The sets are nested: the
    best of 8 is chosen from the first 8 of the 512."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Settings that turn logits into codes."""
    seed: int = 0
    """Seed of the first candidate of the first caption; each further candidate's seed is one higher."""

    def __post_init__(self) -> None:
        check_candidates(self.candidates)
        check_at_least(1, samples_per_caption=self.samples_per_caption)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that a figure depends on besides the two sets of images; written beside every figure."""

    name: str
    """Name in the files of results."""
    preprocessing: ImagePreprocessing = field(default_factory=ImagePreprocessing)
    """Resizing of images on both sides."""
    blur_radii: tuple[int, ...] = (0,)
    """Standard deviations in pixels of the Gaussian blur of both sides; 0 is none (Fig. 9a and b)."""
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)
    """Settings of the measures."""
    reference: Literal["split", "captions"] = "split"
    """Reference images. split: all images of the split. captions: the images of the chosen captions, in that order."""
    reference_count: int | None = None
    """Number of random reference images of the split; null for all."""
    generation: GenerationProtocol = field(default_factory=GenerationProtocol)
    """Settings of a model's images; `evaluate`, which compares two folders, ignores them."""

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
    """Settings that measure what the best of n candidates gains, for several n."""

    prompts: int = 200
    """Number of captions."""
    candidates: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Increasing numbers n; the last is the number of candidates sampled for each caption (Fig. 9c)."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Settings that turn logits into codes; a higher temperature than for single samples makes candidates differ."""

    def __post_init__(self) -> None:
        check_candidates(self.candidates)
        check_at_least(1, prompts=self.prompts)
