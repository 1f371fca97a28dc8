"""Copies of real photos are found among them, and no two photos are taken for one."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from planted import KINDS, planted

from lightning_dalle.data.images.duplicates import (
    CROPS,
    FINE,
    SIDE,
    WHOLE,
    Lookalikes,
    find_reference,
    find_within,
    first_copies,
    lay_over,
    slopes,
    thumbnail,
)

THRESHOLD = 0.3  # the command's own
TWINS = {"000000318219", "000000554625"}
"""One photo that COCO has twice, its margins cut differently."""


class Photos(NamedTuple):
    paths: list[Path]
    thumbs: list[Image.Image]
    known: Lookalikes


@pytest.fixture(scope="module")
def photos(real_data: Path) -> Photos:
    """All 330."""
    paths = sorted((real_data / "coco").glob("*/*.jpg"))
    thumbs = [thumbnail(Image.open(path)) for path in paths]
    return Photos(paths, thumbs, Lookalikes(thumbs, CROPS))


@pytest.mark.parametrize("kind", KINDS)
def test_19_of_20_planted_copies_are_found(photos: Photos, kind: str) -> None:
    chosen = range(0, 330, 11)
    copies = [planted(Image.open(photos.paths[i]).convert("RGB"), kind, str(i)) for i in chosen]
    found = [find_reference(thumbnail(copy), photos.known) for copy in copies]
    right = [
        match is not None and match.distance <= THRESHOLD and match.number == i
        for match, i in zip(found, chosen, strict=True)
    ]
    assert np.mean(right) >= 0.95


def test_of_330_photos_none_is_near_another_but_one_that_is_there_twice(photos: Photos) -> None:
    found = find_within(Lookalikes(photos.thumbs, [WHOLE]))
    near = [{photos.paths[i].stem for i in pair} for pair, distance in found.items() if distance <= THRESHOLD]
    assert near == [TWINS]
    assert sorted(found.values())[1] > THRESHOLD + 0.2


def test_a_crop_is_found_whether_it_comes_before_or_after_its_original(photos: Photos) -> None:
    copy = thumbnail(planted(Image.open(photos.paths[5]).convert("RGB"), "cropped by a tenth", "0"))
    others = photos.thumbs[:5]
    for thumbs in ([*others, copy, photos.thumbs[5]], [*others, photos.thumbs[5], copy]):
        found = find_within(Lookalikes(thumbs, [WHOLE]))
        assert [pair for pair, distance in found.items() if distance <= THRESHOLD] == [(5, 6)]


def test_of_a_dozen_copies_of_one_photo_the_first_stays(photos: Photos) -> None:
    picture = Image.open(photos.paths[5]).convert("RGB")
    copies = [thumbnail(planted(picture, "recompressed", str(seed))) for seed in range(12)]
    found = find_within(Lookalikes([photos.thumbs[0], *copies], [WHOLE]))
    near = [pair for pair, distance in found.items() if distance <= THRESHOLD]
    assert first_copies(13, near) == [0, *[1] * 12]


def test_where_no_two_are_the_same_every_picture_is_the_first() -> None:
    assert first_copies(3, []) == [0, 1, 2]


def test_the_distance_is_0_to_itself_and_falls_as_the_crop_is_moved_into_place(photos: Photos) -> None:
    original = Image.open(photos.paths[0]).convert("RGB")
    width, height = original.size
    copy = thumbnail(original.crop((0, 0, round(0.87 * width), round(0.88 * height))))
    begin = (0.0, 0.0, 0.9 * SIDE, 0.9 * SIDE)
    unmoved = 1 - float(slopes(copy, FINE) @ slopes(photos.thumbs[0], FINE, begin))
    assert lay_over(photos.thumbs[0], photos.thumbs[0], WHOLE) == pytest.approx(0, abs=1e-6)
    assert lay_over(copy, photos.thumbs[0], begin) < 0.1 < unmoved


def test_pictures_of_one_colour_or_of_noise_that_no_one_sees_are_like_nothing() -> None:
    noise = np.random.default_rng(0).integers(127, 130, (2, 64, 64), dtype=np.uint8)
    plain = [Image.new("L", (64, 64), grey) for grey in (0, 0, 255)] + [Image.fromarray(pixels) for pixels in noise]
    assert find_within(Lookalikes(plain, [WHOLE])) == {}
