"""Each loss equals its equation."""

import math

import pytest
import torch
from torch.testing import assert_close

from lightning_dalle.losses import codebook_entropy, dalle_loss, dvae_loss, kl_to_uniform, logit_laplace_nll
from lightning_dalle.models.dvae import LogitLaplace, unmap_pixels


@pytest.mark.parametrize(("mu", "log_scale"), [(0.0, 0.0), (0.7, -1.0), (-1.5, 0.5)])
def test_logit_laplace_density_integrates_to_one(mu: float, log_scale: float) -> None:
    """Integrate over logits, which cover the whole real line; images in [0, 1] would only cover (0.1, 0.9)."""
    logit = torch.linspace(-40, 40, 2_000_001, dtype=torch.double)
    x = torch.sigmoid(logit)
    images = (x - 0.1) / 0.8
    shape = (1, 1, 1, -1)
    expanded = images.view(shape).expand(1, 3, 1, -1)
    pixels = LogitLaplace(torch.full_like(expanded, mu), torch.full_like(expanded, log_scale))
    density = torch.exp(-logit_laplace_nll(expanded, pixels))[0, 0, 0]
    inside = (x > 1e-12) & (x < 1 - 1e-12)
    assert float(torch.trapezoid(density[inside], x[inside])) == pytest.approx(1.0, abs=1e-3)


def test_logit_laplace_nll_is_lowest_at_the_mode() -> None:
    mu = torch.randn(1, 3, 4, 4)
    pixels = LogitLaplace(mu.clamp(-2, 2), torch.zeros_like(mu))
    at_mode = logit_laplace_nll(pixels.image, pixels)
    assert (at_mode <= logit_laplace_nll((pixels.image + 0.05).clamp(0, 1), pixels) + 1e-6).float().mean() > 0.9
    assert_close(pixels.image, unmap_pixels(torch.sigmoid(pixels.mu)))


def test_kl_to_uniform_at_its_extremes() -> None:
    one_hot = torch.full((1, 8192, 2, 2), -1e4).index_fill(1, torch.tensor([7]), 0.0)
    assert_close(kl_to_uniform(torch.zeros(1, 8192, 2, 2)), torch.zeros(1, 2, 2), atol=1e-5, rtol=0)
    assert_close(kl_to_uniform(one_hot), torch.full((1, 2, 2), math.log(8192)))


def test_kl_weight_is_a_192nd_at_eight_fold_downsampling() -> None:
    """Check the paper's beta = 6.6 on a loss divided by 256 x 256 x 3: at most 0.310 nats per pixel and channel."""
    images = torch.rand(1, 3, 256, 256)
    one_hot = torch.full((1, 8192, 32, 32), -1e4).index_fill(1, torch.tensor([7]), 0.0)
    pixels = LogitLaplace(torch.zeros_like(images), torch.zeros_like(images))
    parts = dvae_loss(images, one_hot, pixels, kl_weight=6.6)
    from_kl = parts["loss"] - parts["loss_pixels"]
    assert float(from_kl) == pytest.approx(6.6 / 192 * math.log(8192), rel=1e-4)
    assert float(from_kl) == pytest.approx(0.310, abs=1e-3)
    assert_close(parts["kl"], torch.tensor(math.log(8192)))


def test_the_dvae_loss_is_the_weighted_sum_of_its_parts() -> None:
    images, logits = torch.rand(2, 3, 8, 8), torch.randn(2, 16, 4, 4)
    pixels = LogitLaplace(torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8))
    parts = dvae_loss(images, logits, pixels, kl_weight=6.6, codebook_entropy_weight=0.5, mse_weight=10.0)
    assert_close(parts["mse"], ((pixels.image - images) ** 2).mean())
    kl_per_pixel = parts["kl"] * 16 / (3 * 64)
    total = parts["loss_pixels"] + 10 * parts["mse"] + 6.6 * kl_per_pixel - 0.5 * parts["codebook_entropy"]
    assert_close(parts["loss"], total)


def test_codebook_entropy_is_0_at_collapse_and_ln_k_at_even_use() -> None:
    collapsed = torch.zeros(2, 16, 2, 2)
    collapsed[:, 3] = 100.0
    even = 100.0 * torch.eye(16).view(1, 16, 4, 4)
    assert float(codebook_entropy(collapsed)) == pytest.approx(0.0, abs=1e-5)
    assert float(codebook_entropy(even)) == pytest.approx(math.log(16), rel=1e-5)


def test_codebook_entropy_has_a_finite_gradient_when_codes_are_unused() -> None:
    logits = torch.zeros(2, 16, 2, 2)
    logits[:, 3] = 1000.0
    logits.requires_grad_()
    codebook_entropy(logits).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_uniform_logits_score_the_logarithm_of_the_vocabulary() -> None:
    text_tokens = torch.tensor([[3, 1, 20, 21], [5, 9, 2, 21]])
    parts = dalle_loss(
        torch.zeros(2, 4, 18), torch.zeros(2, 9, 32), text_tokens, torch.randint(32, (2, 9)), image_weight=7.0
    )
    assert float(parts["loss_text"]) == pytest.approx(math.log(18))
    assert float(parts["loss_image"]) == pytest.approx(math.log(32))
    assert float(parts["loss"]) == pytest.approx(math.log(18) / 8 + math.log(32) * 7 / 8)


def test_padding_is_not_predicted() -> None:
    text_tokens = torch.tensor([[3, 18, 19]])
    logits = torch.randn(1, 3, 18)
    parts = dalle_loss(logits, torch.zeros(1, 4, 5), text_tokens, torch.zeros(1, 4).long(), image_weight=7.0)
    assert_close(parts["loss_text"], -logits[0, 0].log_softmax(-1)[3])


def test_codes_may_be_probabilities() -> None:
    text_tokens, logits, codes = torch.tensor([[1, 2]]), torch.randn(1, 4, 5), torch.tensor([[0, 3, 3, 1]])
    hard = dalle_loss(torch.zeros(1, 2, 3), logits, text_tokens, codes, 7.0)
    certain = dalle_loss(torch.zeros(1, 2, 3), logits, text_tokens, torch.eye(5)[codes], 7.0)
    assert_close(certain["loss"], hard["loss"])
    p = torch.softmax(torch.randn(1, 4, 5), -1)
    soft = dalle_loss(torch.zeros(1, 2, 3), p.log(), text_tokens, p, 7.0)
    assert_close(soft["loss_image"], torch.special.entr(p).sum(-1).mean())


def test_a_batch_without_captions_has_no_text_loss() -> None:
    parts = dalle_loss(
        torch.zeros(1, 3, 18), torch.zeros(1, 4, 5), torch.tensor([[18, 19, 20]]), torch.zeros(1, 4).long(), 7.0
    )
    assert float(parts["loss_text"]) == 0.0
