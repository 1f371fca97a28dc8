"""Which captions are drawn, how the best of nested candidates are kept, and how a killed drawing goes on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from datasets import Image as EncodedImage
from PIL import Image
from shrunk import Redness

from lightning_dalle.checkpoints import weights_digest
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.features import Processes
from lightning_dalle.evaluation.protocol import Captions, Drawing, Protocol
from lightning_dalle.evaluation.zero_shot import (
    Prompt,
    choose_captions,
    choose_reference,
    draw_pictures,
    places,
    shared_pictures,
)
from lightning_dalle.images import texts_of
from lightning_dalle.inference.pipeline import TextToImage

PROMPTS = [Prompt("a cat", "1"), Prompt("a dog", "2"), Prompt("a red bus", "3")]


@pytest.fixture
def rows() -> Dataset:
    captions = [["a cat", "one cat"], ["a dog", "a cat"], ["a bird", "a red bird", "a bird"]]
    return Dataset.from_dict({"captions": captions, "id": ["7", "8", "9"]})


@pytest.fixture
def pipeline(dalle_checkpoint: Path) -> TextToImage:
    return TextToImage.from_pretrained(dalle_checkpoint)


def test_unique_captions_are_the_first_of_each(rows: Dataset) -> None:
    found = choose_captions(rows, Captions())
    assert found == [
        Prompt("a cat", "7"), Prompt("one cat", "7"), Prompt("a dog", "8"), Prompt("a bird", "9"),
        Prompt("a red bird", "9"),
    ]  # fmt: skip
    assert len(choose_captions(rows, Captions(unique=False))) == 7


def test_a_number_of_captions_is_drawn_by_the_seed_alone(rows: Dataset) -> None:
    some = choose_captions(rows, Captions(count=3, seed=1))
    assert len(some) == 3
    assert some == choose_captions(rows, Captions(count=3, seed=1))
    assert some != choose_captions(rows, Captions(count=3, seed=2))
    assert [prompt.picture for prompt in choose_captions(rows, Captions(one_per_picture=True, unique=False))] == [
        "7", "8", "9",
    ]  # fmt: skip


def test_the_field_s_list_is_read_in_order(rows: Dataset, real_data: Path) -> None:
    prompts = choose_captions(rows, Captions(list=real_data / "coco" / "coco_30k.csv"))
    assert len(prompts) == 30_000
    assert prompts[0] == Prompt("A bicycle replica with a clock as the front wheel.", "000000203564")


def test_real_pictures_are_found_by_their_number(rows: Dataset) -> None:
    assert places(rows, [Prompt("a", "0008"), Prompt("b", "10"), Prompt("c", None), Prompt("d", "7")]) == [
        1, None, None, 0,
    ]  # fmt: skip
    assert places(rows.remove_columns("id"), [Prompt("a", "0"), Prompt("b", "2")]) == [0, 2]


def test_a_list_with_other_columns_or_none_at_all(rows: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    with pytest.raises(UserError, match="there is no such file"):
        choose_captions(rows, Captions(list=path))
    path.write_text("image,text\n1,a cat\n")
    with pytest.raises(UserError, match=r"columns image_id and prompt, but .* has image, text"):
        choose_captions(rows, Captions(list=path))
    path.write_text("image_id,prompt\n")
    with pytest.raises(UserError, match="lists no caption"):
        choose_captions(rows, Captions(list=path))


def test_a_list_with_a_mark_blank_captions_or_no_text(
    rows: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "list.csv"
    path.write_text('image_id,prompt\n1,"a cat,\na dog"\n2,  \n3\n', encoding="utf-8-sig", newline="")
    assert choose_captions(rows, Captions(list=path)) == [Prompt("a cat,\na dog", "1")]
    assert "passed over 2 blank captions of 3" in caplog.text
    path.write_bytes(b"image_id,prompt\n1,caf\xe9\n")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        choose_captions(rows, Captions(list=path))


def test_the_best_of_more_candidates_scores_no_less(pipeline: TextToImage, tmp_path: Path) -> None:
    drawing = Drawing(candidates=(1, 2, 5), samples_per_caption=2)
    draw_pictures(pipeline, PROMPTS, drawing, tmp_path, Redness(), batch_size=3)
    scores = {
        size: [float(texts_of(tmp_path / f"best_of_{size}" / f"{i:06d}.png")["score"]) for i in range(6)]
        for size in drawing.candidates
    }
    for fewer, more in ((1, 2), (2, 5)):
        assert all(a <= b for a, b in zip(scores[fewer], scores[more], strict=True))
    assert scores[1] != scores[5]
    for i in range(6):  # the seed that is written down makes the very picture that was kept
        texts = texts_of(tmp_path / "best_of_5" / f"{i:06d}.png")
        assert texts["caption"] == PROMPTS[i // 2].caption
        assert int(texts["seed"]) // 5 == i
        assert texts["Copyright"] == "Made from cats."


def test_the_best_does_not_depend_on_the_batch(pipeline: TextToImage, tmp_path: Path) -> None:
    for batch_size in (2, 64):
        drawing = Drawing(candidates=(4,))
        draw_pictures(pipeline, PROMPTS, drawing, tmp_path / str(batch_size), Redness(), batch_size)
    for i in range(3):
        name = f"best_of_4/{i:06d}.png"
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "64" / name).read_bytes()


def test_what_is_there_is_not_drawn_again(
    pipeline: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_pictures(pipeline, PROMPTS, Drawing(), tmp_path)
    first = {path.name: path.read_bytes() for path in (tmp_path / "best_of_1").iterdir()}
    (tmp_path / "best_of_1" / "000001.png").unlink()
    drawn: list[str] = []
    draw = TextToImage.draw

    def noted(self: TextToImage, requests: list, *args: object, **kwargs: object) -> object:
        drawn.extend(request.prompt for request in requests)
        return draw(self, requests, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(TextToImage, "draw", noted)
    draw_pictures(pipeline, PROMPTS, Drawing(), tmp_path)
    assert drawn == ["a dog"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "best_of_1").iterdir()} == first


def test_two_processes_draw_what_one_draws(pipeline: TextToImage, tmp_path: Path) -> None:
    draw_pictures(pipeline, PROMPTS, Drawing(), tmp_path / "one")
    for rank in (0, 1):
        draw_pictures(pipeline, PROMPTS, Drawing(), tmp_path / "two", processes=Processes(rank, 2))
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / n / "best_of_1").iterdir()} for n in ("one", "two")
    )
    assert one == two


def test_candidates_without_a_scorer(pipeline: TextToImage, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="best of 4 candidates is to be kept, but no scorer is given"):
        draw_pictures(pipeline, PROMPTS, Drawing(candidates=(1, 4)), tmp_path)


@pytest.mark.parametrize("sizes", [(), (2, 1), (1, 1), (0, 1)])
def test_candidates_rise(sizes: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="rising numbers"):
        Drawing(candidates=sizes)


def test_pictures_of_the_training_data_are_found_in_the_reference(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")

    def dataset(numbers: list[int]) -> Dataset:
        files = [str(tmp_path / f"{i}.png") for i in numbers]
        return Dataset.from_dict({"image": files}).cast_column("image", EncodedImage())

    assert shared_pictures(dataset([0, 1, 2]), dataset([2, 3])) == 1
    assert shared_pictures(dataset([0, 1]), dataset([2, 3])) == 0


def test_as_many_reference_pictures_as_the_protocol_says(rows: Dataset) -> None:
    assert len(choose_reference(rows, Protocol(name="x"))) == 3
    two = choose_reference(rows, Protocol(name="x", reference_count=2))
    assert len(two) == 2
    assert two["id"][:] == choose_reference(rows, Protocol(name="x", reference_count=2))["id"][:]


def test_a_picture_with_a_row_for_each_caption_is_one_picture() -> None:
    captions = [["a cat"], ["one cat"], ["a dog"], ["a bird"]]
    rows = Dataset.from_dict({"captions": captions, "id": ["7", "7", "8", "7"]})
    one_each = choose_captions(rows, Captions(one_per_picture=True))
    assert [prompt.picture for prompt in one_each] == ["7", "8"]
    assert choose_reference(rows, Protocol(name="x"))["captions"][:] == [["a cat"], ["a dog"]]
    mixed = rows.add_column("source", [0, 0, 1, 1])  # the 7 of one source is not that of another
    assert choose_reference(mixed, Protocol(name="x"))["captions"][:] == [["a cat"], ["a dog"], ["a bird"]]


def test_the_digest_is_of_the_weights(pipeline: TextToImage, dalle_checkpoint: Path) -> None:
    again = TextToImage.from_pretrained(dalle_checkpoint)
    assert weights_digest(pipeline.dalle) == weights_digest(again.dalle)
    with torch.no_grad():
        again.dalle.start[0] += 1
    assert weights_digest(pipeline.dalle) != weights_digest(again.dalle)


def progress_of(draw: Callable[[Callable[[int, int], None]], None]) -> list[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    draw(lambda done, total: told.append((done, total)))
    return told


def test_progress_rises_to_the_whole(pipeline: TextToImage, tmp_path: Path) -> None:
    told = progress_of(lambda on: draw_pictures(pipeline, PROMPTS, Drawing(), tmp_path, None, 2, on))
    assert told == sorted(told)
    assert told[-1] == (3, 3)
