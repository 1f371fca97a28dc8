"""Parity with openai/DALL-E (PyPI package, used in tests only), and the ranges of codes and pixels."""

import dall_e.decoder
import dall_e.encoder
import dall_e.utils
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_dalle.errors import UserError
from lightning_dalle.models.dvae import (
    DVAE,
    Decoder,
    DVAEConfig,
    Encoder,
    gumbel_softmax,
    map_pixels,
    unmap_pixels,
)


def copy_from_openai(theirs: nn.Module, ours: nn.Module) -> None:
    renamed = {
        name.removesuffix(".w") + ".weight" if name.endswith(".w") else name.removesuffix(".b") + ".bias": value
        for name, value in theirs.state_dict().items()
    }
    ours.load_state_dict(renamed)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_full_size_has_openais_parameter_counts() -> None:
    with torch.device("meta"):
        encoder, decoder = Encoder(DVAEConfig()), Decoder(DVAEConfig())
    assert (count(encoder), count(decoder)) == (53_786_240, 43_829_766)
    assert (len(encoder.state_dict()), len(decoder.state_dict())) == (74, 76)


def test_equals_openais_modules_on_copied_weights() -> None:
    """Use four groups of two blocks, 64 channels and 512 codes, the smallest shape that OpenAI's classes accept."""
    config = DVAEConfig(image_size=32, codebook_size=512, n_hid=64)
    encoder, decoder = Encoder(config), Decoder(config)
    their_encoder = dall_e.encoder.Encoder(n_hid=64, vocab_size=512)
    their_decoder = dall_e.decoder.Decoder(n_hid=64, vocab_size=512, output_channels=3)
    copy_from_openai(their_encoder, encoder)
    copy_from_openai(their_decoder, decoder)
    images = torch.rand(2, 3, 32, 32)
    x = dall_e.utils.map_pixels(images)
    assert_close(map_pixels(images), x)
    logits = encoder(x)
    assert_close(logits, their_encoder(x))
    z = logits.softmax(1)
    assert_close(decoder(z), their_decoder(z))


def test_convolutions_are_initialized_as_openais() -> None:
    encoder = Encoder(DVAEConfig(image_size=32, codebook_size=512, n_hid=64))
    conv = encoder.get_submodule("blocks.group_4.block_1.res_path.conv_1")
    assert float(conv.weight.std()) == pytest.approx((256 * 9) ** -0.5, rel=0.02)
    assert not conv.bias.any()


def test_unmap_pixels_inverts_map_pixels() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert_close(unmap_pixels(map_pixels(images)), images)
    assert map_pixels(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])


def test_codes_and_images_keep_their_range(dvae: DVAE) -> None:
    codes = dvae.encode(torch.rand(3, 3, 16, 16))
    assert codes.shape == (3, 4, 4)
    assert 0 <= codes.min() <= codes.max() < 11
    images = dvae.decode(codes)
    assert images.shape == (3, 3, 16, 16)
    assert 0 <= images.min() <= images.max() <= 1


def test_relaxed_codes_become_one_hot_as_the_temperature_falls() -> None:
    logits = torch.randn(2, 11, 4, 4)

    def relaxed(temperature: float) -> Tensor:
        return gumbel_softmax(logits, temperature, torch.Generator().manual_seed(1))

    assert_close(relaxed(0.7).sum(1), torch.ones(2, 4, 4))
    assert relaxed(1e-6).max(1).values.min() > 0.99
    assert torch.equal(relaxed(1e-6).argmax(1), relaxed(0.7).argmax(1))


def test_relaxed_samples_follow_the_categorical() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log()[None, :, None, None].expand(1, 3, 100, 100)
    codes = gumbel_softmax(logits, 0.5, torch.Generator().manual_seed(0)).argmax(1)
    assert_close(codes.flatten().bincount() / 10_000, torch.tensor([0.1, 0.2, 0.7]), atol=0.02, rtol=0)


def test_min_log_scale_bounds_the_log_scale() -> None:
    config = DVAEConfig(image_size=16, codebook_size=11, n_group=3, n_block=1, n_hid=8, min_log_scale=-2.0)
    dvae = DVAE(config)
    nn.init.constant_(dvae.decoder.get_submodule("blocks.output.conv").bias, -9.0)
    assert float(dvae.reconstruct(torch.zeros(1, 4, 4).long()).log_scale.min()) == -2.0


def test_codes_and_their_one_hot_vectors_have_equal_reconstructions() -> None:
    dvae = DVAE(DVAEConfig(image_size=16, codebook_size=11, n_group=3, n_block=1, n_hid=8))
    nn.init.normal_(dvae.decoder.get_submodule("blocks.input").bias)
    codes = torch.randint(11, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    one_hot = nn.functional.one_hot(codes, 11).movedim(-1, 1).float()
    for ours, theirs in zip(dvae.reconstruct(codes), dvae.reconstruct(one_hot), strict=True):
        assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_with_patches_each_code_still_covers_its_own_pixels() -> None:
    config = DVAEConfig(image_size=16, codebook_size=11, n_group=2, patch=2, n_block=1, n_hid=8)
    dvae = DVAE(config)
    assert config.grid == 4
    codes = torch.zeros(1, 4, 4).long()
    changed = codes.clone()
    changed[0, 1, 2] = 1
    difference = (dvae.decode(changed) - dvae.decode(codes)).abs().sum((0, 1))  # (16, 16)
    assert divmod(int(difference.argmax()) // 16 // 4 * 4 + int(difference.argmax()) % 16 // 4, 4) == (1, 2)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dvae.encoder_logits(images)[0, :, 1, 2].sum().backward()
    slope = images.grad.abs().sum((0, 1)).unfold(0, 4, 4).unfold(1, 4, 4).sum((2, 3))  # (4, 4)
    assert int(slope.argmax()) == 1 * 4 + 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_size": 30}, r"image_size \(30\) must be a positive multiple of 8, .*: change data.image_size"),
        ({"image_size": -8}, r"image_size \(-8\) must be a positive multiple of 8"),
        ({"n_hid": 6}, r"n_hid \(6\) must be a multiple of 4, since"),
    ],
)
def test_an_invalid_shape_is_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DVAEConfig(**values)
