"""One path from captions to pictures: ranked, the same in any batch, completed, and the same from the command line."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.ImageChops import difference
from shrunk import Redness

from lightning_dalle import TextToImage
from lightning_dalle.checkpoints import clip_record
from lightning_dalle.cli import main
from lightning_dalle.errors import UserError
from lightning_dalle.images import to_array
from lightning_dalle.inference.scorers import TrainedCLIP
from lightning_dalle.models.clip import CLIP, CLIPConfig


@pytest.fixture
def pipeline(dalle_checkpoint: Path) -> TextToImage:
    made = TextToImage.from_pretrained(dalle_checkpoint)
    made.scorer = Redness()
    return made


@pytest.fixture
def clip_checkpoint(tmp_path: Path) -> Path:
    config = CLIPConfig(image_size=16, patch_size=8, vision_width=16, vision_layers=1, text_width=16, text_layers=1,
                        head_width=8, embed_dim=8, text_len=8)  # fmt: skip
    weights = {f"clip.{name}": value for name, value in CLIP.new(config).state_dict().items()}
    torch.save({"state_dict": weights, **clip_record(config)}, tmp_path / "clip.ckpt")
    return tmp_path / "clip.ckpt"


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_same_seed_gives_the_same_pictures_in_any_batch(pipeline: TextToImage, batch_size: int) -> None:
    pictures = pipeline("a cat", num_candidates=7, top=4, seed=3, batch_size=batch_size)
    again = pipeline("a cat", num_candidates=7, top=4, seed=3, batch_size=7)
    assert [picture.seed for picture in pictures] == [picture.seed for picture in again]
    assert [picture.image.tobytes() for picture in pictures] == [picture.image.tobytes() for picture in again]
    scores = [picture.score for picture in pictures]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]


def test_the_seed_of_a_picture_makes_it_alone(pipeline: TextToImage) -> None:
    best = pipeline("a cat", num_candidates=9, top=1, seed=20)[0]
    assert 20 <= best.seed < 29
    assert pipeline("a cat", seed=best.seed)[0].image.tobytes() == best.image.tobytes()


def test_generate_equals_it(dalle_checkpoint: Path, clip_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(
        ["generate", "--checkpoint", str(dalle_checkpoint), "--prompts", '["a dog", "a cat"]', "--num_candidates", "5",
         "--top", "2", "--seed", "11", "--clip", str(clip_checkpoint), "--out", str(out), "--batch_size", "3"]
    )  # fmt: skip
    pipeline = TextToImage.from_pretrained(dalle_checkpoint)
    pipeline.scorer = TrainedCLIP(clip_checkpoint)
    for n, prompt in enumerate(("a dog", "a cat")):
        expected = pipeline(prompt, num_candidates=5, top=2, seed=11 + 5 * n)
        for rank, picture in enumerate(expected):
            file = out / f"{n:04d}_{prompt.replace(' ', '_')}_{rank:04d}.png"
            assert Image.open(file).tobytes() == picture.image.tobytes()
            record = json.loads(file.with_suffix(".json").read_text())
            assert record["seed"] == picture.seed
            assert record["score"] == pytest.approx(picture.score, abs=1e-6)  # its last bits depend on the batch
            assert record["candidates"] == 5
            assert record["ranked_by"].startswith("lightning_dalle.inference.scorers.TrainedCLIP CLIP ")


def test_a_run_s_folder_brings_its_clip(tiny_run: dict[str, Path]) -> None:
    pipeline = TextToImage.from_pretrained(tiny_run["dvae"].parent)
    pictures = pipeline("red apple", num_candidates=4, top=2)
    assert len(pictures) == 2
    assert all(-1 <= picture.score <= 1 for picture in pictures if picture.score is not None)
    assert pictures[0].score is not None


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_completed_picture_begins_with_what_was_given(pipeline: TextToImage, picture: Path, rows: int) -> None:
    with Image.open(picture) as opened:
        given = pipeline.given(opened, rows)
    assert len(given.codes) == 4 * rows
    made, pasted = (pipeline("a cat", 3, given=given, paste=paste) for paste in (False, True))
    by_seed = [sorted(pictures, key=lambda one: one.seed) for pictures in (made, pasted)]
    for one, other in zip(*by_seed, strict=True):
        top = (0, 0, 16, 4 * rows)
        original = torch.from_numpy(to_array(other.image.crop(top)).copy()).movedim(-1, 0) / 255
        assert (original - given.pixels).abs().max() <= 0.5 / 255 + 1e-6
        below = (0, 4 * rows, 16, 16)
        assert difference(one.image.crop(below), other.image.crop(below)).getbbox() is None


def test_fifteen_of_thirty_two_rows_are_given_by_default(pipeline: TextToImage, picture: Path) -> None:
    with Image.open(picture) as opened:
        assert len(pipeline.given(opened).codes) == 4  # one of four rows
        with pytest.raises(UserError, match="from 1 to 3, of a grid of 4"):
            pipeline.given(opened, 4)


def test_candidates_that_nothing_can_choose_from(dalle_checkpoint: Path) -> None:
    pipeline = TextToImage.from_pretrained(dalle_checkpoint)
    with pytest.raises(UserError, match="the best 1 of 4 candidates are to be kept, but there is no CLIP"):
        pipeline("a cat", num_candidates=4, top=1)
    with pytest.raises(UserError, match="of 4 candidates 5 are to be kept"):
        pipeline("a cat", num_candidates=4, top=5)
    assert [picture.score for picture in pipeline("a cat", num_candidates=2)] == [None, None]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is neither a recipe's run nor a release with a DALL-E"):
        TextToImage.from_pretrained(tmp_path)


def test_a_checkpoint_in_parts_is_told_how_to_become_one_file(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    with pytest.raises(UserError, match=r"is a folder, a checkpoint in parts, but one file is needed: make it by"):
        TextToImage.from_pretrained(tmp_path)


def test_a_long_prompt_is_cut_by_both_tokenizers(
    dalle_checkpoint: Path, clip_checkpoint: Path, recwarn: pytest.WarningsRecorder
) -> None:
    pipeline = TextToImage.from_pretrained(dalle_checkpoint)
    pipeline.scorer = TrainedCLIP(clip_checkpoint)
    pictures = pipeline("a cat on a mat " * 40, num_candidates=2, top=1)
    assert len(pictures) == 1
    assert any("cut to text_len=6" in str(warning.message) for warning in recwarn)
