"""The augmentations have the distributions of the paper's listings, measured on an image of pixel coordinates."""

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare
from torchvision.transforms import v2

from lightning_dalle.data.images.decoding import Pixels
from lightning_dalle.data.images.transforms import (
    Augmentation,
    DALLEAugmentation,
    DVAEAugmentation,
    area_resize,
    center_crop,
)

SIZE = 64  # of the windows: 9/8 and 12/8 of it are 72 and 96


def coordinates(width: int, height: int) -> Pixels:
    """Return an image whose red channel is the column and whose green channel is the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)


def black(width: int, height: int) -> Pixels:
    return np.zeros((height, width, 3), np.uint8)


class Cut(NamedTuple):
    """Position of a window along one axis of its image."""

    resized: int
    """Side of the resized square that the window is part of."""
    offset: int
    """Offset of the window in that square, in pixels; in the image, if nothing was resized."""
    is_flipped: bool


def cuts(augmentation: Augmentation, width: int, height: int, count: int = 2000, size: int = SIZE) -> list[list[Cut]]:
    """Return the cuts of many random windows, along the width and along the height."""
    image, rng = coordinates(width, height), random.Random(0)
    windows = [augmentation(image, size, rng).astype(float) for _ in range(count)]
    assert {window.shape for window in windows} == {(size, size, 3)}
    return [
        [cut(window[..., channel].mean(axis=channel), min(width, height)) for window in windows] for channel in (0, 1)
    ]


def cut(values: np.ndarray, side: int) -> Cut:
    """Recover a cut from coordinates along an axis; a resized pixel is (side - 1) / (resized - 1) pixels wide."""
    is_flipped = bool(values[0] > values[-1])
    step, first = np.polyfit(np.arange(len(values)), values[::-1] if is_flipped else values, 1)
    return Cut(round((side - 1) / step) + 1, round((first - (step - 1) / 2) / step), is_flipped)


def is_uniform(samples: Iterable[int], values: Sequence[int]) -> bool:
    """Return whether samples are uniform over the values, by a chi-square test."""
    counts = np.bincount(np.array(list(samples)) - values[0], minlength=len(values))
    return len(counts) == len(values) and bool(chisquare(counts).pvalue > 0.01)


def offsets_are_uniform(along: list[Cut]) -> bool:
    """Return whether offsets of windows are uniform in their resized squares."""
    slacks = np.array([a.resized - SIZE for a in along])
    offsets = np.array([a.offset for a in along])
    assert (offsets >= 0).all()
    assert (offsets <= slacks).all()
    places = range(slacks.max() + 1)
    expected = [(1 / (1 + slacks[slacks >= place])).sum() for place in places]
    return bool(chisquare(np.bincount(offsets, minlength=len(places)), expected).pvalue > 0.01)


def test_listing_1_resizes_to_9_to_12_eighths_takes_any_window_of_it_and_flips_every_other() -> None:
    width, height = cuts(DVAEAugmentation(), 250, 250)
    for axis in (width, height):
        assert is_uniform([a.resized for a in axis], range(72, 97))
        assert offsets_are_uniform(axis)
    assert [a.resized for a in width] == [a.resized for a in height]
    assert is_uniform([a.is_flipped for a in width], range(2))
    assert not any(a.is_flipped for a in height)


def test_listing_2_resizes_to_8_to_9_eighths_and_takes_any_window_of_it() -> None:
    along = cuts(DALLEAugmentation(), 250, 250)
    for axis in along:
        assert is_uniform([a.resized for a in axis], range(64, 73))
        assert offsets_are_uniform(axis)
        assert not any(a.is_flipped for a in axis)


@pytest.mark.parametrize("is_wide", [True, False])
def test_listing_1_takes_any_square_and_listing_2_one_within_3_to_5_eighths_of_the_slack(is_wide: bool) -> None:
    size = (240, SIZE) if is_wide else (SIZE, 240)  # so small that nothing is resized: a slack of 176 pixels
    for augmentation, places in ((DVAEAugmentation(), range(177)), (DALLEAugmentation(), range(66, 110))):
        along = cuts(augmentation, *size)
        long, short = along if is_wide else reversed(along)
        assert is_uniform([a.offset for a in long], places)
        assert {(a.resized, a.offset) for a in short} == {(SIZE, 0)}


@pytest.mark.parametrize(
    ("augmentation", "side", "least", "most"),
    [
        (DVAEAugmentation(), 500, 288, 384),
        (DVAEAugmentation(), 300, 288, 300),
        (DVAEAugmentation(), 270, 270, 270),
        (DALLEAugmentation(), 500, 256, 288),
        (DALLEAugmentation(), 270, 256, 270),
    ],
)
def test_at_256_pixels_the_sides_are_the_papers_and_none_is_enlarged(
    augmentation: Augmentation, side: int, least: int, most: int
) -> None:
    class Extremes(random.Random):
        def randint(self, a: int, b: int) -> int:
            ranges.add((a, b))
            return super().randint(a, b)

    ranges: set[tuple[int, int]] = set()
    augmentation(black(side, side), 256, Extremes())
    assert (least, most) in ranges


def test_an_image_smaller_than_the_image_size_is_enlarged() -> None:
    for augmentation in (DVAEAugmentation(), DALLEAugmentation()):
        assert augmentation(black(50, 20), SIZE, random.Random(0)).shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("augmentation", [DVAEAugmentation(), DALLEAugmentation()])
def test_a_crop_depends_only_on_its_seed(augmentation: Augmentation) -> None:
    image = coordinates(250, 120)
    windows = [augmentation(image, SIZE, random.Random(seed)).tobytes() for seed in (0, 1, 0)]
    assert windows[0] == windows[2] != windows[1]


@pytest.mark.parametrize("augmentation", [DVAEAugmentation(), DALLEAugmentation()])
def test_a_window_is_a_copy(augmentation: Augmentation) -> None:
    image = coordinates(250, SIZE)  # as high as the window, so that nothing is resized
    assert not any(np.shares_memory(image, augmentation(image, SIZE, random.Random(seed))) for seed in range(8))


def test_a_resized_pixel_is_the_mean_over_its_area() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    # 7 to 5 with aligned corners: windows of 6/4 pixels, three halves, the last of which extends beyond the edge.
    halves = np.pad(pixels, ((0, 1), (0, 1), (0, 0)), mode="edge").astype(float).repeat(2, axis=0).repeat(2, axis=1)
    means = halves[:15, :15].reshape(5, 3, 5, 3, 3).mean(axis=(1, 3))
    resized = area_resize(pixels, 5).astype(float)
    assert np.abs(resized - means).max() <= 0.5001


@pytest.mark.parametrize("size", [(33, 33), (200, 200), (97, 60), (60, 97), (640, 427), (70, 64)])
def test_center_crop_equals_torchvision(size: tuple[int, int]) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    resized = v2.functional.center_crop(v2.functional.resize(image, [SIZE], antialias=True), [SIZE])
    difference = np.abs(center_crop(np.asarray(image), SIZE).astype(int) - np.asarray(resized))
    assert difference.max() <= (0 if size[0] == size[1] else 1)


def test_center_crop_of_a_long_line_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    line = np.full((1, 20_000, 3), (0, 128, 128), np.uint8)
    resized: list[tuple[int, int]] = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *more: resized.append(size) or resize(self, size, *more)
    )
    assert np.unique(center_crop(line, SIZE)).tolist() == [0, 128]
    assert resized == [(SIZE, SIZE)]


def test_a_square_of_the_target_size_is_unchanged() -> None:
    image = coordinates(64, 64)
    assert np.array_equal(area_resize(image, 64), image)
