"""Every filter on captions and image sizes on both sides of its threshold."""

import json
from pathlib import Path

import pytest

from lightning_dalle.data.filters.rules import AspectRatio, Boilerplate, DuplicateCaptions, TooLong, TooShort, TooSmall
from lightning_dalle.errors import UserError


def test_words_without_letters_are_not_counted() -> None:
    rule = TooShort(min_words=3, min_characters=10)
    assert not rule.rejects_caption("a red fox!")
    assert rule.rejects_caption("a red fox")  # nine characters
    assert rule.rejects_caption("photograph 12 - 2012 fox")  # two words
    assert TooLong(max_characters=3).rejects_caption("four")
    assert not TooLong(max_characters=4).rejects_caption("four")


@pytest.mark.parametrize(
    "caption",
    [
        "photographed on 4 May 2012", "Photographed on May 4th, 2012 at 10:31", "taken on 2012-05-04",
        "Posted: 04/05/2012",
        "image uploaded on Friday, 4 May 2012", "photo from 2012", "IMG_0042", "DSC-1234 (2)", "IMG_0042.JPG",
        "holiday-2012_small.png", "Photo by Jane Doe", "image courtesy of NASA", "image 3 of 12", "Slide 4", "logo",
        "click to enlarge", "Click here for more", "View full size", "Royalty Free Stock Photos", "stock photo 123456",
        "© 2012 Jane Doe", "No image available", "placeholder image", "https://a.org/b",
        "www.a.org", "12345", "---", "loading...", "Untitled",
    ],
)  # fmt: skip
def test_boilerplate_captions_are_rejected(caption: str) -> None:
    assert Boilerplate().rejects_caption(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "Old Football On American Flag, photographed on 4 May 2012", "a photographed cat", "a page of a book",
        "logo of a fox",
        "Rooster Royalty Free Stock Photos", "photo of a cat by the sea", "a man taken to court in 2012", "e.g. a fox",
        "image of a fox", "a click beetle", "the copyright office", "view of the larger lake", "工場", "Slide rule 4",
        "Photo by Jane Doe: two foxes by the sea", "photographed on 4 May 2012: a fox by the sea at dusk",
    ],
)  # fmt: skip
def test_descriptions_are_not_boilerplate(caption: str) -> None:
    assert not Boilerplate().rejects_caption(caption)


def test_boilerplate_patterns_can_be_replaced() -> None:
    rule = Boilerplate(patterns=("sold out",))
    assert rule.rejects_caption("Sold Out")
    assert not rule.rejects_caption("sold out fox")
    with pytest.raises(UserError, match=r"correct the patterns of Boilerplate: '\(' is invalid, missing \)"):
        Boilerplate(patterns=("(",))


def test_images_are_filtered_by_aspect_ratio_and_size() -> None:
    ratio = AspectRatio()  # the paper's [1/2, 2]
    assert [ratio.rejects_image(*size) for size in ((200, 100), (100, 200), (201, 100), (100, 201))] == [
        False, False, True, True,
    ]  # fmt: skip
    small = TooSmall(min_side=64)
    assert [small.rejects_image(*size) for size in ((64, 64), (640, 63), (63, 640))] == [False, True, True]


def test_caption_counts_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "caption_counts.json"
    file.write_text(json.dumps({"more_than": 2, "captions": {"a fox": 3, "an owl": 9}}))
    assert DuplicateCaptions(max_count=2, file=file).rejects_caption("A Fox")
    assert not DuplicateCaptions(max_count=3, file=file).rejects_caption("a fox")
    assert DuplicateCaptions(max_count=3, file=file).rejects_caption("an owl")
    with pytest.raises(
        UserError,
        match=r"counts.json lists only .* more than 2 records, but .* is 1: raise max_count to 2, or run `data report",
    ):
        DuplicateCaptions(max_count=1, file=file).rejects_caption("a fox")
    with pytest.raises(
        UserError, match=r"caption counts from nowhere.json .*; run `data report --caption_counts nowhere"
    ):
        DuplicateCaptions(file=Path("nowhere.json")).rejects_caption("a fox")
    with pytest.raises(UserError, match="cannot count streamed data: run `data report --caption_counts FILE`"):
        DuplicateCaptions().rejects_caption("a fox")
