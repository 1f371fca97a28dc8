"""Checkpoints: loading, refused files, and which of them training can resume from."""

import re
from pathlib import Path

import pytest
import torch

from lightning_dalle.checkpoints import (
    FORMAT_VERSION,
    check_resumable,
    load_clip,
    load_dalle,
    load_dvae,
    read_checkpoint,
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


def test_weights_that_do_not_match_the_config_are_refused(dvae_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(dvae_checkpoint, weights_only=True)
    checkpoint["dvae_config"]["codebook_size"] = 12
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    with pytest.raises(
        UserError, match=r"weights in .*odd\.ckpt do not match its dvae_config; choose another checkpoint:"
    ):
        load_dvae(tmp_path / "odd.ckpt")


def test_a_config_of_another_version_is_refused(dvae_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(dvae_checkpoint, weights_only=True)
    checkpoint["dvae_config"]["n_heads"] = 12
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=r"odd\.ckpt is of another version of .*, load it with that one: .*n_heads"):
        load_dvae(tmp_path / "odd.ckpt")


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
