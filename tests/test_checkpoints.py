"""What a checkpoint carries comes back."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_dalle.checkpoints import load_dalle, load_dvae
from lightning_dalle.errors import UserError
from lightning_dalle.inference.config import SamplingOptions
from lightning_dalle.inference.pipeline import Request, TextToImage
from lightning_dalle.models.dvae import DVAE


def test_a_dvae_comes_back(dvae: DVAE, dvae_checkpoint: Path) -> None:
    images = torch.rand(2, 3, 16, 16)
    loaded = load_dvae(dvae_checkpoint)
    assert loaded.config == dvae.config
    assert not loaded.training
    assert torch.equal(loaded.encoder_logits(images), dvae.encoder_logits(images))


def test_a_dalle_brings_its_dvae_and_its_tokenizer(dvae: DVAE, dalle_checkpoint: Path) -> None:
    loaded = load_dalle(dalle_checkpoint)
    assert loaded.dalle.config.grid == loaded.dvae.config.grid
    assert loaded.tokenizer.text_len == loaded.dalle.config.text_len
    assert torch.equal(load_dvae(dalle_checkpoint).encoder_logits(torch.ones(1, 3, 16, 16)),
                       dvae.encoder_logits(torch.ones(1, 3, 16, 16)))  # fmt: skip


def test_weights_of_another_shape_are_refused(dvae_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(dvae_checkpoint, weights_only=True)
    checkpoint["dvae_config"]["codebook_size"] = 12
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match=r"odd.ckpt do not fit the shape"):
        load_dvae(tmp_path / "odd.ckpt")


def pictures(pipeline: TextToImage, batch_size: int, given: Tensor | None = None) -> Tensor:
    requests = [Request("a cat", seed) for seed in range(5)]
    return torch.stack(list(pipeline.draw(requests, SamplingOptions(), given, batch_size)))


def test_pictures_are_the_same_in_batches_of_any_size(dalle_checkpoint: Path) -> None:
    pipeline = TextToImage.from_pretrained(dalle_checkpoint)
    assert torch.equal(pictures(pipeline, 5), pictures(pipeline, 2))
    assert pictures(pipeline, 5).shape == (5, 3, 16, 16)


def test_a_long_prompt_is_cut_and_not_fatal(dalle_checkpoint: Path) -> None:
    with pytest.warns(UserWarning, match="cut to text_len=6"):
        tokens = TextToImage.from_pretrained(dalle_checkpoint).tokens(["a cat on a mat"])
    assert tokens.shape == (1, 6)


def test_progress_counts_codes_to_the_end(dalle_checkpoint: Path) -> None:
    told: list[tuple[int, int]] = []
    pipeline = TextToImage.from_pretrained(dalle_checkpoint)
    list(
        pipeline.draw([Request("a", 0)] * 3, SamplingOptions(), batch_size=2, on_progress=lambda *now: told.append(now))
    )
    assert told[-1] == (48, 48)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_torchs_advice_to_trust_a_file_is_not_repeated(tmp_path: Path) -> None:
    torch.save(print, tmp_path / "odd.ckpt")
    with pytest.raises(
        UserError, match=r"odd\.ckpt is not a checkpoint that can be opened: it holds objects that only code"
    ):
        load_dvae(tmp_path / "odd.ckpt")
