"""Copies of real photos are found, and different photos are not taken for copies."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from planted import KINDS, make_copy

from lightning_dalle.data.images.duplicates import (
    CROPS,
    FINE,
    FULL,
    SIDE,
    DuplicateIndex,
    align_crop,
    cluster_duplicates,
    find_reference,
    find_within,
    gradient_descriptor,
    pairs_with_reference,
    thumbnail,
)
from lightning_dalle.errors import UserError

THRESHOLD = 0.3  # default of `data overlap`
TWINS = {"000000318219", "000000554625"}
"""Names of a photo that COCO contains twice, with different margins."""


class Photos(NamedTuple):
    paths: list[Path]
    thumbs: list[Image.Image]
    index: DuplicateIndex


@pytest.fixture(scope="module")
def photos(real_data: Path) -> Photos:
    """Return all 330 photos of COCO in the test data."""
    paths = sorted((real_data / "coco").glob("*/*.jpg"))
    thumbs = [thumbnail(Image.open(path)) for path in paths]
    return Photos(paths, thumbs, DuplicateIndex(thumbs, CROPS))


@pytest.mark.parametrize("kind", KINDS)
def test_19_of_20_planted_copies_are_found(photos: Photos, kind: str) -> None:
    chosen = range(0, 330, 11)
    copies = [make_copy(Image.open(photos.paths[i]).convert("RGB"), kind, str(i)) for i in chosen]
    found = [find_reference(thumbnail(copy), photos.index) for copy in copies]
    correct = [
        match is not None and match[1] <= THRESHOLD and match[0] == i for match, i in zip(found, chosen, strict=True)
    ]
    assert np.mean(correct) >= 0.95


def test_the_only_duplicate_among_330_photos_is_one_that_coco_contains_twice(photos: Photos) -> None:
    found = find_within(DuplicateIndex(photos.thumbs, [FULL]))
    near = [{photos.paths[i].stem for i in pair} for pair, distance in found.items() if distance <= THRESHOLD]
    assert near == [TWINS]
    assert sorted(found.values())[1] > THRESHOLD + 0.2


def test_a_crop_is_found_before_and_after_its_original(photos: Photos) -> None:
    copy = thumbnail(make_copy(Image.open(photos.paths[5]).convert("RGB"), "cropped by a tenth", "0"))
    others = photos.thumbs[:5]
    for thumbs in ([*others, copy, photos.thumbs[5]], [*others, photos.thumbs[5], copy]):
        found = find_within(DuplicateIndex(thumbs, [FULL]))
        assert [pair for pair, distance in found.items() if distance <= THRESHOLD] == [(5, 6)]


def test_a_dozen_copies_of_one_photo_form_one_cluster(photos: Photos) -> None:
    image = Image.open(photos.paths[5]).convert("RGB")
    copies = [thumbnail(make_copy(image, "recompressed", str(seed))) for seed in range(12)]
    found = find_within(DuplicateIndex([photos.thumbs[0], *copies], [FULL]))
    near = [pair for pair, distance in found.items() if distance <= THRESHOLD]
    assert cluster_duplicates(13, near) == [0, *[1] * 12]


def test_without_duplicates_every_image_is_its_own_cluster() -> None:
    assert cluster_duplicates(3, []) == [0, 1, 2]


def test_the_distance_to_itself_is_0_and_alignment_reduces_the_distance_to_a_crop(photos: Photos) -> None:
    original = Image.open(photos.paths[0]).convert("RGB")
    width, height = original.size
    copy = thumbnail(original.crop((0, 0, round(0.87 * width), round(0.88 * height))))
    box = (0.0, 0.0, 0.9 * SIDE, 0.9 * SIDE)
    unaligned = 1 - float(gradient_descriptor(copy, FINE) @ gradient_descriptor(photos.thumbs[0], FINE, box))
    assert align_crop(photos.thumbs[0], photos.thumbs[0], FULL) == pytest.approx(0, abs=1e-6)
    assert align_crop(copy, photos.thumbs[0], box) < 0.1 < unaligned


def test_uniform_images_and_invisible_noise_resemble_nothing() -> None:
    noise = np.random.default_rng(0).integers(127, 130, (2, 64, 64), dtype=np.uint8)
    plain = [Image.new("L", (64, 64), grey) for grey in (0, 0, 255)] + [Image.fromarray(pixels) for pixels in noise]
    assert find_within(DuplicateIndex(plain, [FULL])) == {}


def test_a_reference_without_readable_images_is_refused_with_the_reasons() -> None:
    reference = [{"image": None, "id": "a"}, {"image": {"bytes": b"", "path": None}, "id": "b"}]
    counts: dict[str, Counter[str]] = {"reference": Counter(), "train": Counter()}
    message = r"no image of the reference data can be read \(1 missing image, 1 empty image file\): correct its path"
    with pytest.raises(UserError, match=message):
        next(pairs_with_reference([], reference, counts))
