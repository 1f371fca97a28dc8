"""What is measured, as values. Imports no torch, so that `evaluate --help` answers at once."""

from dataclasses import dataclass, field
from typing import Literal

from lightning_dalle.errors import UserError


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
    """Images in a draw; as many as there are where there are fewer."""
    isc_splits: int = 10
    """Parts that the Inception Score is the mean of (Salimans et al. 2016)."""
    neighbours: int = 3
    """k of precision and recall (Kynkaanniemi et al. 2019)."""
    seed: int = 2020
    """Of KID's draws and of the order in which the Inception Score splits."""


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

    def __post_init__(self) -> None:
        if not self.blur_radii or min(self.blur_radii) < 0:
            raise UserError(f"blur_radii are {list(self.blur_radii)}, but must be one or more whole numbers from 0 on")
