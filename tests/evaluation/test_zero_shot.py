"""Choice of captions and reference images, best of nested candidates, and resuming of killed runs."""

import contextlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from datasets import Image as EncodedImage
from PIL import Image
from shrunk import Redness

from lightning_dalle.checkpoints import weights_digest
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation import zero_shot
from lightning_dalle.evaluation.features import DistributedContext
from lightning_dalle.evaluation.protocol import Captions, GenerationProtocol, Protocol
from lightning_dalle.evaluation.zero_shot import (
    Prompt,
    choose_captions,
    choose_reference,
    count_shared_images,
    generate_samples,
    reference_index,
)
from lightning_dalle.images import read_png_texts
from lightning_dalle.inference.pipeline import TextToImage

PROMPTS = [Prompt("a cat", "1"), Prompt("a dog", "2"), Prompt("a red bus", "3")]


@pytest.fixture
def rows() -> Dataset:
    captions = [["a cat", "one cat"], ["a dog", "a cat"], ["a bird", "a red bird", "a bird"]]
    return Dataset.from_dict({"captions": captions, "id": ["7", "8", "9"]})


@pytest.fixture
def pipeline(dalle_checkpoint: Path) -> TextToImage:
    return TextToImage.from_pretrained(dalle_checkpoint)


@pytest.fixture
def red_pipeline(pipeline: TextToImage) -> TextToImage:
    pipeline.scorer = Redness()
    return pipeline


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_unique_captions_are_the_first_of_each(rows: Dataset) -> None:
    found = choose_captions(rows, Captions())
    assert found == [
        Prompt("a cat", "7"), Prompt("one cat", "7"), Prompt("a dog", "8"), Prompt("a bird", "9"),
        Prompt("a red bird", "9"),
    ]  # fmt: skip
    assert len(choose_captions(rows, Captions(unique=False))) == 7


def test_a_number_of_captions_depends_only_on_the_seed(rows: Dataset) -> None:
    some = choose_captions(rows, Captions(count=3, seed=1))
    assert len(some) == 3
    assert some == choose_captions(rows, Captions(count=3, seed=1))
    assert some != choose_captions(rows, Captions(count=3, seed=2))


def test_a_number_of_captions_is_a_permutation_by_torch(rows: Dataset) -> None:
    """The recorded results of the quickstart were sampled in this order."""
    captions = [prompt.caption for prompt in choose_captions(rows, Captions())]
    order = torch.randperm(5, generator=torch.Generator().manual_seed(7))[:4]
    found = choose_captions(rows, Captions(count=4, seed=7))
    assert [prompt.caption for prompt in found] == [captions[i] for i in order]


def test_one_caption_per_image(rows: Dataset) -> None:
    prompts = choose_captions(rows, Captions(one_per_image=True, unique=False))
    assert [prompt.image_name for prompt in prompts] == ["7", "8", "9"]


def test_a_csv_of_captions_is_read_in_order(rows: Dataset, real_data: Path) -> None:
    prompts = choose_captions(rows, Captions(csv=real_data / "coco" / "coco_30k.csv"))
    assert len(prompts) == 30_000
    assert prompts[0] == Prompt("A bicycle replica with a clock as the front wheel.", "000000203564")


def test_real_images_are_found_by_their_number(rows: Dataset) -> None:
    assert reference_index(rows, [Prompt("a", "0008"), Prompt("b", "10"), Prompt("c", None), Prompt("d", "7")]) == [
        1, None, None, 0,
    ]  # fmt: skip
    assert reference_index(rows.remove_columns("id"), [Prompt("a", "0"), Prompt("b", "2")]) == [0, 2]


def test_an_unusable_csv_is_refused(rows: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    with pytest.raises(UserError, match=rf"there is no file {path}: correct the key captions.csv"):
        choose_captions(rows, Captions(csv=path))
    path.write_text("image,text\n1,a cat\n")
    with pytest.raises(UserError, match=r"list.csv has the columns image, text: rename them to image_id and prompt"):
        choose_captions(rows, Captions(csv=path))
    path.write_text("image_id,prompt\n")
    with pytest.raises(UserError, match=r"list.csv lists no caption: give a file with one row per caption"):
        choose_captions(rows, Captions(csv=path))
    path.write_bytes(b"image_id,prompt\n1,caf\xe9\n")
    with pytest.raises(UserError, match=r"list.csv is not UTF-8 .*: save it as UTF-8"):
        choose_captions(rows, Captions(csv=path))


def test_a_csv_may_have_a_byte_order_mark_and_blank_captions(
    rows: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "list.csv"
    path.write_text('image_id,prompt\n1,"a cat,\na dog"\n2,  \n3\n', encoding="utf-8-sig", newline="")
    assert choose_captions(rows, Captions(csv=path)) == [Prompt("a cat,\na dog", "1")]
    assert "skipped 2 blank captions of 3" in caplog.text


def test_the_best_of_more_candidates_scores_no_less(red_pipeline: TextToImage, tmp_path: Path) -> None:
    generation = GenerationProtocol(candidates=(1, 2, 5), samples_per_caption=2)
    folders = {n: tmp_path / str(n) for n in generation.candidates}
    generate_samples(red_pipeline, PROMPTS, generation, folders, batch_size=3)
    scores = {
        n: [float(read_png_texts(folder / f"{i:06d}.png")["score"]) for i in range(6)] for n, folder in folders.items()
    }
    for fewer, more in ((1, 2), (2, 5)):
        assert all(a <= b for a, b in zip(scores[fewer], scores[more], strict=True))
    assert scores[1] != scores[5]
    for i in range(6):
        texts = read_png_texts(folders[5] / f"{i:06d}.png")
        assert texts["caption"] == PROMPTS[i // 2].caption
        assert int(texts["seed"]) // 5 == i
        assert texts["Copyright"] == "Made from cats."


def test_the_best_does_not_depend_on_the_batch(red_pipeline: TextToImage, tmp_path: Path) -> None:
    for batch_size in (2, 64):
        folders = {4: tmp_path / str(batch_size)}
        generate_samples(red_pipeline, PROMPTS, GenerationProtocol(candidates=(4,)), folders, batch_size)
    assert files(tmp_path / "2") == files(tmp_path / "64")
    assert len(files(tmp_path / "2")) == 3


def test_existing_samples_are_not_generated_again(
    pipeline: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_samples(pipeline, PROMPTS, GenerationProtocol(), {1: tmp_path})
    first = files(tmp_path)
    (tmp_path / "000001.png").unlink()
    sampled: list[str] = []
    sample_images = TextToImage.sample_images

    def noted(self: TextToImage, requests: list, *args: object, **kwargs: object) -> object:
        sampled.extend(request.prompt for request in requests)
        return sample_images(self, requests, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(TextToImage, "sample_images", noted)
    generate_samples(pipeline, PROMPTS, GenerationProtocol(), {1: tmp_path})
    assert sampled == ["a dog"]
    assert files(tmp_path) == first


def test_two_processes_generate_what_one_generates(pipeline: TextToImage, tmp_path: Path) -> None:
    generate_samples(pipeline, PROMPTS, GenerationProtocol(), {1: tmp_path / "one"})
    for rank in (0, 1):
        context = DistributedContext(rank, 2)
        generate_samples(pipeline, PROMPTS, GenerationProtocol(), {1: tmp_path / "two"}, context=context)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_several_candidates_need_a_scorer(pipeline: TextToImage, tmp_path: Path) -> None:
    generation = GenerationProtocol(candidates=(1, 4))
    with pytest.raises(UserError, match="cannot choose the best 1 of 4 candidates without a scorer: give a CLIP"):
        generate_samples(pipeline, PROMPTS, generation, {n: tmp_path / str(n) for n in (1, 4)})


@pytest.mark.parametrize(
    ("sizes", "given"), [((), "none"), ((2, 1), "2, 1"), ((1, 1), "1, 1"), ((0, 1), "0, 1")], ids=str
)
def test_numbers_of_candidates_must_increase_from_1(sizes: tuple[int, ...], given: str) -> None:
    with pytest.raises(UserError, match=f"the number of candidates is {given}, but must be at least 1"):
        GenerationProtocol(candidates=sizes)


def test_training_images_are_counted_in_the_reference(tmp_path: Path) -> None:
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")

    def dataset(numbers: list[int]) -> Dataset:
        paths = [str(tmp_path / f"{i}.png") for i in numbers]
        return Dataset.from_dict({"image": paths}).cast_column("image", EncodedImage())

    assert count_shared_images(dataset([0, 1, 2]), dataset([2, 3])) == 1
    assert count_shared_images(dataset([0, 1]), dataset([2, 3])) == 0


def test_reference_count_limits_the_reference_images(rows: Dataset) -> None:
    assert len(choose_reference(rows, Protocol(name="x"))) == 3
    two = choose_reference(rows, Protocol(name="x", reference_count=2))
    assert len(two) == 2
    assert two["id"][:] == choose_reference(rows, Protocol(name="x", reference_count=2))["id"][:]


def test_the_reference_may_be_the_images_of_the_captions_in_their_order(rows: Dataset, tmp_path: Path) -> None:
    captions = Captions(count=4, seed=3)
    protocol = Protocol(name="x", reference="captions", generation=GenerationProtocol(captions=captions))
    names = [prompt.image_name for prompt in choose_captions(rows, captions)]
    assert len(set(names)) < len(names), "an image with two captions appears once"
    assert choose_reference(rows, protocol)["id"][:] == list(dict.fromkeys(names))

    (tmp_path / "list.csv").write_text("image_id,prompt\n1,a cat\n")
    elsewhere = GenerationProtocol(captions=Captions(csv=tmp_path / "list.csv"))
    with pytest.raises(UserError, match=r"none of the 1 captions .* has an image in the split val: set `reference:"):
        choose_reference(rows, Protocol(name="x", reference="captions", generation=elsewhere))
    with pytest.raises(UserError, match=r"reference_count is 2, but `reference: captions` .*: remove one"):
        Protocol(name="x", reference="captions", reference_count=2)


def test_rows_of_one_name_are_one_image() -> None:
    captions = [["a cat"], ["one cat"], ["a dog"], ["a bird"]]
    rows = Dataset.from_dict({"captions": captions, "id": ["7", "7", "8", "7"]})
    one_each = choose_captions(rows, Captions(one_per_image=True))
    assert [prompt.image_name for prompt in one_each] == ["7", "8"]
    assert choose_reference(rows, Protocol(name="x"))["captions"][:] == [["a cat"], ["a dog"]]
    mixed = rows.add_column("source", [0, 0, 1, 1])  # two sources may use one id for different images
    assert choose_reference(mixed, Protocol(name="x"))["captions"][:] == [["a cat"], ["a dog"], ["a bird"]]


def test_the_digest_depends_on_the_weights(pipeline: TextToImage, dalle_checkpoint: Path) -> None:
    again = TextToImage.from_pretrained(dalle_checkpoint)
    assert weights_digest(pipeline.dalle) == weights_digest(again.dalle)
    with torch.no_grad():
        again.dalle.start[0] += 1
    assert weights_digest(pipeline.dalle) != weights_digest(again.dalle)


def test_progress_rises_to_the_total(pipeline: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    record = contextlib.nullcontext(lambda done, total: calls.append((done, total)))
    monkeypatch.setattr(zero_shot, "progress_bar", lambda description: record)
    generate_samples(pipeline, PROMPTS, GenerationProtocol(), {1: tmp_path}, batch_size=2)
    assert calls == sorted(calls)
    assert calls[-1] == (3, 3)
