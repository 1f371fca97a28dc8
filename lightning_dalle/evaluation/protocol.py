"""What is measured, as values. Imports no torch, so that `evaluate --help` answers at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning_dalle.errors import UserError
from lightning_dalle.inference.config import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How pictures of any size become images that can be compared, the same on both sides."""

    image_size: int | None = 256
    """Side of the images, in pixels; without one the pictures stay as they are, and must all be of one size."""
    resize: Literal["torchvision", "clean-fid"] = "torchvision"
    """torchvision: the shorter side to `image_size`, bilinear with antialias, then the middle square; Inception itself
    resizes that to 299 as TensorFlow 1 did. clean-fid: the whole picture to 299 x 299, bicubic with antialias (Parmar
    et al. 2022; here rounded to 8 bits), whatever `image_size` is."""


@dataclass(frozen=True, kw_only=True)
class FidelityOptions:
    """The choices that the measures leave open; the defaults are torch-fidelity's, and the field's."""

    kid_subsets: int = 100
    """Draws that KID is the mean of."""
    kid_subset_size: int = 1000
    """Images in a draw; at most half of either side, so that the draws differ."""
    isc_splits: int = 10
    """Parts that the Inception Score is the mean of (Salimans et al. 2016)."""
    neighbours: int = 3
    """k of precision and recall (Kynkaanniemi et al. 2019)."""
    bootstrap: int = 0
    """Times that both sides' images are drawn anew, with replacement, for the deviation of FID; 0 for none. Each takes
    as long as FID itself: seconds, on a CPU up to a minute."""
    seed: int = 2020
    """Of KID's draws, the order in which the Inception Score splits, the bootstrap and the reference's choice."""

    def __post_init__(self) -> None:
        least = {"kid_subsets": 1, "kid_subset_size": 2, "isc_splits": 1, "neighbours": 1, "bootstrap": 0}
        for name, at_least in least.items():
            if getattr(self, name) < at_least:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least {at_least}")


@dataclass(frozen=True, kw_only=True)
class Captions:
    """Which captions of a split pictures are made of; the same for every model."""

    list: Path | None = None
    """A CSV with the columns image_id and prompt, such as the field's 30,000 of COCO; read in order."""
    one_per_picture: bool = False
    """One caption of each picture, rather than all."""
    unique: bool = True
    """A caption that several pictures share is taken once (the paper's choice for CUB)."""
    count: int | None = None
    """At most so many, in a random order (30,000 for COCO in the paper); all if not given."""
    seed: int = 0
    """Of the choice and the order."""

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise UserError(f"the captions' count is {self.count}, but must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a model's pictures are made."""

    split: str = "val"
    """Of the data; the reference pictures are this split's too."""
    captions: Captions = field(default_factory=Captions)
    """What is drawn."""
    samples_per_caption: int = 1
    """Pictures kept of each caption, each the best of its own candidates."""
    candidates: tuple[int, ...] = (1,)
    """Sizes of the sets that the best picture is taken from (Fig. 9c: 1 to 512). The sets are nested: the first 8 of
    512 candidates are the set of 8."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """How codes are drawn."""
    seed: int = 0
    """The first candidate's of the first caption; the next have the seeds after it."""

    def __post_init__(self) -> None:
        sizes = list(self.candidates)
        if not sizes or sizes != sorted(set(sizes)) or sizes[0] < 1:
            raise UserError(f"candidates are {sizes}, but must be rising numbers from 1 on")
        if self.samples_per_caption < 1:
            raise UserError(f"samples_per_caption is {self.samples_per_caption}, but must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All that a figure depends on besides the two sets of pictures; printed with every figure."""

    name: str
    """What results are filed under."""
    preparation: Preparation = field(default_factory=Preparation)
    """Of the pictures, on both sides."""
    blur_radii: tuple[int, ...] = (0,)
    """Deviations of the Gaussian that both sides are blurred with, in pixels; 0 is none (paper, Fig. 9a and b)."""
    fidelity: FidelityOptions = field(default_factory=FidelityOptions)
    """Of the measures."""
    reference_count: int | None = None
    """Reference pictures, drawn by the measures' seed; all of the split if not given."""
    drawing: Drawing = field(default_factory=Drawing)
    """Of a model's pictures; two folders are compared without it."""

    def __post_init__(self) -> None:
        if not self.blur_radii or min(self.blur_radii) < 0:
            raise UserError(f"blur_radii are {list(self.blur_radii)}, but must be one or more whole numbers from 0 on")
        if self.reference_count is not None and self.reference_count < 1:
            raise UserError(f"reference_count is {self.reference_count}, but must be at least 1")
