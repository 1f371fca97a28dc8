"""Checkpoints: loading, refused files, and which of them training can resume from."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_dalle.checkpoints import (
    FORMAT_VERSION,
    check_resumable,
    load_clip,
    load_dalle,
    load_dvae,
    read_checkpoint,
    resolve_checkpoint,
    weights_digest,
    write_safetensors,
)
from lightning_dalle.errors import UserError
from lightning_dalle.inference.config import SamplingConfig
from lightning_dalle.inference.pipeline import Request, TextToImage
from lightning_dalle.models.dvae import DVAE


def test_a_dvae_is_loaded_with_its_config_and_weights(dvae: DVAE, dvae_checkpoint: Path) -> None:
    images = torch.rand(2, 3, 16, 16)
    loaded = load_dvae(dvae_checkpoint)
    assert loaded.config == dvae.config
    assert not loaded.training
    assert torch.equal(loaded.encoder_logits(images), dvae.encoder_logits(images))


def test_a_dalle_is_loaded_with_its_dvae_and_tokenizer(dvae: DVAE, dalle_checkpoint: Path) -> None:
    loaded = load_dalle(dalle_checkpoint)
    assert not loaded.dalle.training
    assert loaded.dalle.config.grid == loaded.dvae.config.grid
    assert loaded.tokenizer.text_len == loaded.dalle.config.text_len
    assert torch.equal(load_dvae(dalle_checkpoint).encoder_logits(torch.ones(1, 3, 16, 16)),
                       dvae.encoder_logits(torch.ones(1, 3, 16, 16)))  # fmt: skip


def test_a_checkpoint_without_the_wanted_model_is_refused(dvae_checkpoint: Path, dalle_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"a DALL-E checkpoint is needed, but .*dvae\.ckpt has only a dVAE: correct"):
        load_dalle(dvae_checkpoint)
    with pytest.raises(UserError, match=r"a CLIP checkpoint is needed, but .* has only a dVAE and a DALL-E: correct"):
        load_clip(dalle_checkpoint)


def test_a_release_and_a_run_contain_every_model(dvae_checkpoint: Path, dalle_checkpoint: Path, tmp_path: Path) -> None:
    run, release = tmp_path / "run", tmp_path / "release"
    for stage, file in (("dvae", dvae_checkpoint), ("dalle", dalle_checkpoint)):
        (run / stage / "checkpoints").mkdir(parents=True)
        file.rename(run / stage / "checkpoints" / "last.ckpt")
    release.mkdir()
    write_safetensors(release / "dalle.safetensors", read_checkpoint(run, "dalle"))
    assert resolve_checkpoint(str(run), "dvae") == run / "dvae" / "checkpoints" / "last.ckpt"
    assert resolve_checkpoint(str(release), "dvae") == release / "dalle.safetensors"
    for folder in (run, release):
        assert weights_digest(load_dvae(str(folder))) == weights_digest(load_dalle(str(folder)).dvae)
        files = r"neither clip/checkpoints/last\.ckpt nor clip\.safetensors"
        with pytest.raises(UserError, match=rf"{folder} has no CLIP, {files}: give a checkpoint, or a folder of a run"):
            load_clip(folder)


def test_a_dvae_is_read_out_of_a_dalles_checkpoint(dalle_checkpoint: Path, dvae: DVAE) -> None:
    checkpoint = read_checkpoint(dalle_checkpoint, "dvae")
    assert set(checkpoint["state_dict"]) == {f"dvae.{name}" for name in dvae.state_dict()}
    assert "dalle_config" not in checkpoint


def test_a_safetensors_file_has_the_keys_that_lightning_and_evaluations_read(
    dalle_checkpoint: Path, dvae_checkpoint: Path, tmp_path: Path
) -> None:
    trained = {**read_checkpoint(dalle_checkpoint), "global_step": 12}
    write_safetensors(tmp_path / "dalle.safetensors", trained)
    found = read_checkpoint(tmp_path / "dalle.safetensors")
    assert found["global_step"] == 12
    assert found["CaptionedImageDataModule"] == {"tokenizer": trained["tokenizer"]}
    assert found["pytorch-lightning_version"] == "2.6.1"
    untrained = read_checkpoint(dvae_checkpoint)
    del untrained["global_step"]  # as in the file of `convert`
    write_safetensors(tmp_path / "dvae.safetensors", untrained)
    assert read_checkpoint(tmp_path / "dvae.safetensors")["global_step"] == 0


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "another class": (
        {"dalle_config": None, "dvae_config": None},
        "a DALL-E checkpoint is needed, but {path} has only other models: correct the path",
    ),
    "a newer format": (
        {"format_version": 3},
        "{path} has format_version=3, but this version of lightning_dalle reads 1 to 2: update lightning_dalle, or "
        "choose another checkpoint",
    ),
    "a format of another type": ({"format_version": "two"}, "{path} has format_version='two', but this version of"),
    "no tokenizer": (
        {"tokenizer": None},
        "{path} has a dalle_config, but lacks the key tokenizer: choose another checkpoint",
    ),
    "no attribution": ({"attribution": None}, "{path} has a dalle_config, but lacks the key attribution: choose"),
    "no dVAE": ({"dvae_config": None}, "{path} has a dalle_config, but lacks the key dvae_config: choose another"),
    "a broken tokenizer": ({"tokenizer": "{"}, "the tokenizer in {path} is '{{', which this version of"),
    "a broken BPE": (
        {"tokenizer": '{"bpe": {}, "vocab_size": 1, "text_len": 1}'},
        'the tokenizer in {path} is \'{{"bpe": {{}},',
    ),
    "a config of another type": (
        {"dvae_config": "large"},
        "the dvae_config in {path} is 'large', which this version of lightning_dalle cannot use (",
    ),
    "a config without a field": ({"dalle_config": {"text_len": 6}}, "the dalle_config in {path} is {{'text_len': 6}},"),
    "a config of another version": (
        {"dvae_config": {"n_heads": 12}},
        "the dvae_config in {path} is {{'n_heads': 12}}, which this version of lightning_dalle cannot use ",
    ),
    "other shapes": (
        {"dvae_config": {"image_size": 16, "codebook_size": 12, "n_group": 3, "n_block": 1, "n_hid": 8, "n_init": 8}},
        "the weights in {path} do not fit its configs: dvae.encoder.blocks.output.conv.weight has shape "
        "(11, 32, 1, 1), but (12, 32, 1, 1) is needed (3 weights differ); choose another checkpoint",
    ),
}
"""Replaced keys of a checkpoint, None for a missing key, and the expected start of the error message."""


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_refused_by_file_and_key(dalle_checkpoint: Path, damage: str, suffix: str) -> None:
    changes, message = DAMAGED[damage]
    checkpoint = {**read_checkpoint(dalle_checkpoint), **changes}
    checkpoint = {key: value for key, value in checkpoint.items() if key not in changes or value is not None}
    path = dalle_checkpoint.with_name(f"damaged{suffix}")
    if suffix == ".ckpt":
        torch.save(checkpoint, path)
    else:
        write_safetensors(path, checkpoint)
    with pytest.raises(UserError, match=f"^{re.escape(message.format(path=path))}") as refused:
        load_dalle(path)
    assert len(str(refused.value)) < 1000


def test_a_missing_weight_is_named(dvae_checkpoint: Path) -> None:
    checkpoint = torch.load(dvae_checkpoint, weights_only=True)
    del checkpoint["state_dict"]["dvae.decoder.blocks.input.bias"]
    torch.save(checkpoint, dvae_checkpoint)
    with pytest.raises(
        UserError, match=r"dvae\.decoder\.blocks\.input\.bias has shape None, but \(8,\) is needed \(1 w"
    ):
        load_dvae(dvae_checkpoint)


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_a_safetensors_file_with_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    save_file({"dvae.x": torch.zeros(1)}, tmp_path / "odd.safetensors", {"lightning_dalle": text})
    with pytest.raises(
        UserError,
        match=r"read .*odd\.safetensors as .* with JSON under the metadata key lightning_dalle, choose another",
    ):
        load_dvae(tmp_path / "odd.safetensors")


def test_training_resumes_from_the_current_format_only(dvae_checkpoint: Path) -> None:
    checkpoint = read_checkpoint(dvae_checkpoint)
    check_resumable(checkpoint, dvae_checkpoint)
    del checkpoint["format_version"]
    remedy = "use it with generate/test/export, or resume with commit 6ca43fc"
    message = f"cannot resume from {dvae_checkpoint}: it has checkpoint format 1"
    with pytest.raises(UserError, match=f"^{re.escape(message)}, this version resumes format 2; {remedy}$"):
        check_resumable(checkpoint, dvae_checkpoint)
    with pytest.raises(UserError, match="it has checkpoint format 3, this version resumes format 2; use it with"):
        check_resumable({"format_version": FORMAT_VERSION + 1}, dvae_checkpoint)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_checkpoint_of_format_1_is_loaded_for_inference(dalle_checkpoint: Path, suffix: str) -> None:
    checkpoint = read_checkpoint(dalle_checkpoint)
    del checkpoint["format_version"]
    old = dalle_checkpoint.with_name(f"old{suffix}")
    if suffix == ".ckpt":
        torch.save(checkpoint, old)
    else:
        write_safetensors(old, checkpoint)
    assert "format_version" not in read_checkpoint(old)
    new, old_dalle = load_dalle(dalle_checkpoint), load_dalle(old)
    assert old_dalle.attribution == new.attribution
    for name, weight in new.dalle.state_dict().items():
        assert torch.equal(old_dalle.dalle.state_dict()[name], weight)


def sample(pipeline: TextToImage, batch_size: int) -> torch.Tensor:
    requests = [Request("a cat", seed) for seed in range(5)]
    return torch.stack(list(pipeline.sample_images(requests, SamplingConfig(), batch_size=batch_size)))


def test_images_do_not_depend_on_the_batch_size(dalle_checkpoint: Path) -> None:
    pipeline = TextToImage.from_pretrained(dalle_checkpoint)
    assert torch.equal(sample(pipeline, 5), sample(pipeline, 2))
    assert sample(pipeline, 5).shape == (5, 3, 16, 16)


def test_a_long_prompt_is_truncated_with_a_warning(dalle_checkpoint: Path) -> None:
    with pytest.warns(UserWarning, match="truncated to data.text_len=6"):
        tokens = TextToImage.from_pretrained(dalle_checkpoint).tokenize(["a cat on a mat"])
    assert tokens.shape == (1, 6)


def test_progress_counts_all_codes(dalle_checkpoint: Path) -> None:
    calls: list[tuple[int, int]] = []
    pipeline = TextToImage.from_pretrained(dalle_checkpoint)
    requests = [Request("a", 0)] * 3
    list(
        pipeline.sample_images(
            requests, SamplingConfig(), batch_size=2, on_progress=lambda done, total: calls.append((done, total))
        )
    )
    assert calls[-1] == (48, 48)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_torchs_advice_to_trust_a_file_is_not_repeated(tmp_path: Path) -> None:
    torch.save(print, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=r"cannot read .*odd\.ckpt as a checkpoint: it contains .*; choose another"):
        load_dvae(tmp_path / "odd.ckpt")


def test_a_truncated_checkpoint_is_refused(dvae_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "short.ckpt").write_bytes(dvae_checkpoint.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot read .*short\.ckpt as a checkpoint: it was not written by .*; choose"):
        load_dvae(tmp_path / "short.ckpt")
