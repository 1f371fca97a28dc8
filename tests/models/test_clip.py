"""Exported CLIPs give the same embeddings in open_clip, and long captions keep their end token."""

from pathlib import Path

import pytest
import torch

from lightning_dalle.errors import UserError
from lightning_dalle.models.clip import CLIP, CLIPConfig

SMALL = CLIPConfig(
    image_size=16, patch_size=8, vision_width=32, vision_layers=2, text_width=32, text_layers=2, head_width=16,
    embed_dim=24, text_len=12,
)  # fmt: skip


@pytest.fixture
def clip() -> CLIP:
    return CLIP.from_config(SMALL).eval()


def test_open_clip_loads_an_exported_clip(clip: CLIP, tmp_path: Path) -> None:
    import open_clip

    clip.export(tmp_path, SMALL)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    captions = ["a cat", "a dog " * 20]
    images = torch.rand(3, 3, 16, 16)
    normalize = preprocess.transforms[-1]
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval().encode_text(tokenizer(captions), normalize=True), clip.embed_texts(captions)
        )
        torch.testing.assert_close(model.encode_image(normalize(images), normalize=True), clip.embed_images(images))


def test_a_long_caption_keeps_its_end_token(clip: CLIP) -> None:
    short, long, longest = clip.tokenize(["a cat", "a cat " * 50, "cat" * 500])
    end = clip.tokenizer.eot_token_id
    for tokens in (short, long, longest):
        assert len(tokens) == SMALL.text_len
        assert (tokens == end).sum() == 1
    assert long[-1] == longest[-1] == end


def test_images_of_another_size_are_resized(clip: CLIP) -> None:
    assert clip.embed_images(torch.rand(2, 3, 40, 30)).shape == (2, 24)
    assert torch.allclose(clip.embed_images(torch.rand(2, 3, 16, 16)).norm(dim=1), torch.ones(2))


def test_an_invalid_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"image_size \(20\) .* patch_size \(8\): change data.image_size or"):
        CLIPConfig(image_size=20, patch_size=8)
    with pytest.raises(UserError, match=r"text_width \(30\) must be a multiple of head_width \(16\)"):
        CLIPConfig(text_width=30, head_width=16, vision_width=32)
    with pytest.raises(UserError, match=r"text_len \(2\) must be at least 3"):
        CLIPConfig(text_len=2)
