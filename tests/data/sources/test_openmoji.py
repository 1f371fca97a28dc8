"""The splits of OpenMoji: no name and no image of the other splits is trained on."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import DatasetDict

from lightning_dalle.data.sources.openmoji import SKIN_TONES, OpenMoji, link_bases, parse_name

Pair = tuple[str, tuple[str, ...]]


@pytest.fixture(scope="module", params=[32, 64])
def splits(request: pytest.FixtureRequest) -> DatasetDict:
    """Return the splits at the sizes of the configs: different images may be equal at a smaller size."""
    return OpenMoji().load(request.param)


def pairs(splits: DatasetDict, split: str) -> list[Pair]:
    return [(base, tuple(tones)) for base, tones in zip(splits[split]["base"], splits[split]["tones"], strict=True)]


def test_every_captioned_emoji_is_in_one_split(splits: DatasetDict) -> None:
    assert sum(len(split) for split in splits.values()) == 3953
    names = [pair for split in splits for pair in pairs(splits, split)]
    assert len(set(names)) == 3953


def test_no_image_is_in_two_splits(splits: DatasetDict) -> None:
    images = {
        split: {np.asarray(image.convert("RGB")).tobytes() for image in splits[split]["image"]} for split in splits
    }
    assert not images["train"] & images["val"]
    assert not images["train"] & images["compositions"]
    assert not images["val"] & images["compositions"]


def test_training_has_base_and_tone_of_a_composition_but_not_together(splits: DatasetDict) -> None:
    train = pairs(splits, "train")
    bases = {base for base, tones in train if tones}
    tones_alone = {tones for _, tones in train}
    for base, tones in pairs(splits, "compositions"):
        assert len(tones) == 1
        assert base in bases
        assert tones in tones_alone
        assert (base, tones) not in set(train) | set(pairs(splits, "val"))
        assert (base, tones[0]) not in {(other, tone) for other, several in train for tone in several}


def test_every_base_with_single_tones_holds_one_tone_out(splits: DatasetDict) -> None:
    held_out = pairs(splits, "compositions")
    assert len({base for base, _ in held_out}) == len(held_out) == 312
    assert {tones[0] for _, tones in held_out} == set(SKIN_TONES)


def test_val_is_about_5_percent(splits: DatasetDict) -> None:
    assert 0.04 < len(splits["val"]) / (len(splits["val"]) + len(splits["train"])) < 0.07


def test_compositions_are_equal_at_all_sizes(splits: DatasetDict) -> None:
    larger = OpenMoji().load(48)
    assert set(pairs(splits, "compositions")) == set(pairs(larger, "compositions"))


def test_images_have_the_requested_size_and_a_white_background(splits: DatasetDict) -> None:
    image = splits["train"][0]["image"].convert("RGB")
    assert image.size in ((32, 32), (64, 64))
    assert image.getpixel((0, 0)) == (255, 255, 255)


def test_a_killed_build_leaves_no_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_dalle.data.sources.openmoji as module

    monkeypatch.setattr(module, "records", lambda size: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        OpenMoji(cache_dir=tmp_path).load(32)
    assert not list(tmp_path.glob("*-v2"))


def test_names_are_split_into_base_and_tones() -> None:
    assert parse_name("man surfing dark skin tone") == ("man surfing", ["dark"])
    assert parse_name("woman medium-light skin tone curly hair") == ("woman curly hair", ["medium-light"])
    two_toned = parse_name("handshake light skin tone medium-dark skin tone")
    assert two_toned == ("handshake", ["light", "medium-dark"])
    assert parse_name("grinning face") == ("grinning face", [])


def test_bases_are_linked_by_shared_images() -> None:
    shared = [["man farmer dark skin tone", "farmer dark skin tone"], ["farmer", "person with hoe"], ["cat"]]
    assert link_bases(shared) == {"man farmer": "farmer", "farmer": "farmer", "person with hoe": "farmer", "cat": "cat"}


def test_the_context_of_the_quickstarts_clip_holds_every_name(splits: DatasetDict) -> None:
    import open_clip

    config = yaml.safe_load(Path("configs/openmoji/clip.yaml").read_text())
    captions = [caption for split in splits.values() for captions in split["captions"] for caption in captions]
    longest = (open_clip.SimpleTokenizer(context_length=77)(captions) != 0).sum(dim=1).max()
    assert longest <= config["model"]["init_args"]["config"]["text_len"]
