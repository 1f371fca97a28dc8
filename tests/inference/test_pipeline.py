"""Pipeline from prompts to images: reranking, independence of the batch, image prompts, and `generate`."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.ImageChops import difference
from shrunk import Redness

from lightning_dalle import GenerationConfig, SamplingConfig, TextToImage
from lightning_dalle.checkpoints import clip_metadata
from lightning_dalle.cli import main
from lightning_dalle.errors import UserError
from lightning_dalle.images import to_array
from lightning_dalle.inference.pipeline import GeneratedImage, Request
from lightning_dalle.inference.scorers import CLIPScorer, fingerprint, load_scorer
from lightning_dalle.models.clip import CLIP, CLIPConfig


@pytest.fixture
def pipeline(dalle_checkpoint: Path) -> TextToImage:
    loaded = TextToImage.from_pretrained(dalle_checkpoint)
    loaded.scorer = Redness()
    return loaded


@pytest.fixture
def clip_checkpoint(tmp_path: Path) -> Path:
    config = CLIPConfig(image_size=16, patch_size=8, vision_width=16, vision_layers=1, text_width=16, text_layers=1,
                        head_width=8, embed_dim=8, text_len=8)  # fmt: skip
    weights = {f"clip.{name}": value for name, value in CLIP.from_config(config).state_dict().items()}
    torch.save({"state_dict": weights, **clip_metadata(config)}, tmp_path / "clip.ckpt")
    return tmp_path / "clip.ckpt"


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_images_do_not_depend_on_the_batch_size(pipeline: TextToImage, batch_size: int) -> None:
    images = pipeline("a cat", num_candidates=7, top=4, seed=3, batch_size=batch_size)
    again = pipeline("a cat", num_candidates=7, top=4, seed=3, batch_size=7)
    assert [one.seed for one in images] == [one.seed for one in again]
    assert [one.image.tobytes() for one in images] == [one.image.tobytes() for one in again]
    scores = [one.score for one in images]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]


def test_an_images_seed_generates_it_alone(pipeline: TextToImage) -> None:
    best = pipeline("a cat", num_candidates=9, top=1, seed=20)[0]
    assert 20 <= best.seed < 29
    assert pipeline("a cat", seed=best.seed)[0].image.tobytes() == best.image.tobytes()


def test_keywords_replace_fields_of_the_config(pipeline: TextToImage) -> None:
    config = GenerationConfig(num_candidates=3, seed=5, sampling=SamplingConfig(top_k=1))
    images = pipeline("a cat", config, num_candidates=2)
    assert sorted(one.seed for one in images) == [5, 6]
    assert images[0].image.tobytes() == images[1].image.tobytes()  # greedy


def pixels(images: list[GeneratedImage]) -> list[bytes]:
    return [one.image.tobytes() for one in images]


def test_keywords_replace_fields_of_the_sampling_config(pipeline: TextToImage) -> None:
    sampling = SamplingConfig(temperature=0.1, top_k=3)
    expected = pixels(pipeline("a cat", GenerationConfig(sampling=sampling)))
    assert pixels(pipeline("a cat", temperature=0.1, top_k=3)) == expected
    assert pixels(pipeline("a cat", sampling=SamplingConfig(temperature=0.1), top_k=3)) == expected
    assert pixels(pipeline("a cat", GenerationConfig(sampling=sampling), temperature=1.0, top_k=None)) != expected
    with pytest.raises(UserError, match=r"temperature is 0\.0, but must be above 0"):
        pipeline("a cat", temperature=0.0)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("temprature", "temperature"),
        ("num_candidate", "num_candidates"),
        ("topk", "top_k"),
        ("x", "num_candidates, top"),
    ],
)
def test_an_unknown_keyword_is_refused_with_the_nearest_valid_one(
    pipeline: TextToImage, name: str, nearest: str
) -> None:
    with pytest.raises(UserError, match=rf"there is no setting {name} \(given: 0\.5\): use {nearest}"):
        pipeline("a cat", **{name: 0.5})


def test_several_prompts_are_drawn_one_after_the_other(pipeline: TextToImage) -> None:
    images = pipeline(["a cat", "a dog"], num_candidates=2, seed=3)
    assert pixels(images) == pixels([*pipeline("a cat", num_candidates=2, seed=3),
                                     *pipeline("a dog", num_candidates=2, seed=5)])  # fmt: skip


def test_a_string_is_one_prompt(pipeline: TextToImage) -> None:
    (images,) = pipeline.generate("a cat", num_candidates=2)
    assert pixels(images) == pixels(pipeline("a cat", num_candidates=2))
    assert torch.equal(pipeline.tokenize("a cat"), pipeline.tokenize(["a cat"]))
    (alone,) = pipeline.sample_images("a cat", SamplingConfig())
    (requested,) = pipeline.sample_images([Request("a cat", seed=0)], SamplingConfig())
    assert torch.equal(alone, requested)


def test_paths_may_be_strings(dalle_checkpoint: Path, dvae_checkpoint: Path, clip_checkpoint: Path) -> None:
    pipeline = TextToImage.from_pretrained(str(dalle_checkpoint), dvae=str(dvae_checkpoint))
    pipeline.scorer = CLIPScorer.from_checkpoint(str(clip_checkpoint))
    assert fingerprint(pipeline.scorer) == fingerprint(load_scorer(clip_checkpoint))
    assert len(pipeline("a cat", num_candidates=2, top=1)) == 1


def test_generate_writes_the_images_of_the_pipeline(
    dalle_checkpoint: Path, clip_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    main(
        ["generate", "--checkpoint", str(dalle_checkpoint), "--prompts", '["a dog", "a cat"]', "--num_candidates", "5",
         "--top", "2", "--seed", "11", "--clip", str(clip_checkpoint), "--out", str(out), "--batch_size", "3"]
    )  # fmt: skip
    pipeline = TextToImage.from_pretrained(dalle_checkpoint)
    pipeline.scorer = CLIPScorer.from_checkpoint(clip_checkpoint)
    for n, prompt in enumerate(("a dog", "a cat")):
        expected = pipeline(prompt, num_candidates=5, top=2, seed=11 + 5 * n)
        for rank, one in enumerate(expected):
            file = out / f"{n:04d}_{prompt.replace(' ', '_')}_{rank:04d}.png"
            assert Image.open(file).tobytes() == one.image.tobytes()
            record = json.loads(file.with_suffix(".json").read_text())
            assert record["seed"] == one.seed
            assert record["score"] == pytest.approx(one.score, abs=1e-6)  # its last bits depend on the batch
            assert record["candidates"] == 5
            assert record["ranked_by"].startswith("lightning_dalle.inference.scorers.CLIPScorer CLIP ")


def test_a_runs_folder_loads_its_clip_as_the_scorer(tiny_run: dict[str, Path]) -> None:
    pipeline = TextToImage.from_pretrained(tiny_run["dvae"].parent)
    images = pipeline("red apple", num_candidates=4, top=2)
    assert len(images) == 2
    assert all(-1 <= one.score <= 1 for one in images if one.score is not None)
    assert images[0].score is not None


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_completed_image_starts_with_its_image_prompt(pipeline: TextToImage, image_file: Path, rows: int) -> None:
    with Image.open(image_file) as opened:
        prompt = pipeline.image_prompt(opened, rows)
    assert len(prompt.codes) == 4 * rows
    prompts = [prompt._replace(paste=paste) for paste in (False, True)]
    decoded, pasted = (pipeline("a cat", image_prompt=prompt, num_candidates=3) for prompt in prompts)
    by_seed = [sorted(images, key=lambda one: one.seed) for images in (decoded, pasted)]
    for one, other in zip(*by_seed, strict=True):
        top = (0, 0, 16, 4 * rows)
        original = torch.from_numpy(to_array(other.image.crop(top)).copy()).movedim(-1, 0) / 255
        assert (original - prompt.pixels).abs().max() <= 0.5 / 255 + 1e-6
        below = (0, 4 * rows, 16, 16)
        assert difference(one.image.crop(below), other.image.crop(below)).getbbox() is None


def test_an_image_prompt_keeps_15_of_32_rows_by_default(pipeline: TextToImage, image_file: Path) -> None:
    with Image.open(image_file) as opened:
        assert len(pipeline.image_prompt(opened).codes) == 4  # one of four rows
        with pytest.raises(UserError, match="cannot keep 4 rows of a grid of 4: rows must be 1 to 3"):
            pipeline.image_prompt(opened, 4)


def test_fewer_images_than_candidates_need_a_scorer(dalle_checkpoint: Path) -> None:
    pipeline = TextToImage.from_pretrained(dalle_checkpoint)
    with pytest.raises(UserError, match="cannot choose the best 1 of 4 candidates without a scorer: give a CLIP"):
        pipeline("a cat", num_candidates=4, top=1)
    with pytest.raises(UserError, match="cannot keep 5 of 4 candidates: top must be from 1 to 4"):
        pipeline("a cat", num_candidates=4, top=5)
    with pytest.raises(UserError, match="batch_size is 0, but must be at least 1"):
        pipeline("a cat", batch_size=0)
    assert [one.score for one in pipeline("a cat", num_candidates=2)] == [None, None]


def test_a_folder_without_a_dalle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"has no DALL-E, neither dalle/checkpoints/last.ckpt nor .*: give a checkpoint"
    ):
        TextToImage.from_pretrained(tmp_path)


def test_an_empty_prompt_is_refused(pipeline: TextToImage) -> None:
    with pytest.raises(UserError, match="prompt 2 of 2 is empty: give it text"):
        next(pipeline.generate(["a cat", " "]))


def test_a_sharded_checkpoint_is_refused_with_the_command_that_merges_it(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    with pytest.raises(UserError, match=r"is a sharded checkpoint; merge it into one file with python"):
        TextToImage.from_pretrained(tmp_path)


def test_both_tokenizers_truncate_a_long_prompt(
    dalle_checkpoint: Path, clip_checkpoint: Path, recwarn: pytest.WarningsRecorder
) -> None:
    pipeline = TextToImage.from_pretrained(dalle_checkpoint)
    pipeline.scorer = CLIPScorer.from_checkpoint(clip_checkpoint)
    assert len(pipeline("a cat on a mat " * 40, num_candidates=2, top=1)) == 1
    assert any("truncated to data.text_len=6" in str(warning.message) for warning in recwarn)
