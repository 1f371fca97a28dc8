"""Losses of the dVAE and of DALL-E as pure functions."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_dalle.models.dvae import LogitLaplace, map_pixels


def logit_laplace_nll(images: Float[Tensor, "b 3 h w"], pixels: LogitLaplace) -> Float[Tensor, "b 3 h w"]:
    """Return the negative log-density of images mapped by `map_pixels`, per pixel and channel, in nats (paper, eq. 2).

    The density is f(x | mu, b) = 1 / (2 b x (1 - x)) * exp(-|logit(x) - mu| / b), where ln b is `log_scale`.
    """
    x = map_pixels(images)
    error = (torch.logit(x) - pixels.mu).abs()
    return error * torch.exp(-pixels.log_scale) + pixels.log_scale + math.log(2) + torch.log(x * (1 - x))


def kl_to_uniform(logits: Float[Tensor, "b k g g"]) -> Float[Tensor, "b g g"]:
    """Return the KL divergence of each grid position's posterior to the uniform prior, in nats: ln K minus its entropy.

    The posterior is the softmax of the logits at temperature 1, not that of the relaxation (openai/DALL-E issue 26).
    """
    log_q = logits.log_softmax(dim=1)
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(dim=1)


def codebook_entropy(logits: Float[Tensor, "b k g g"]) -> Float[Tensor, ""]:
    """Return the entropy of the posterior averaged over batch and grid, in nats: ln K if all codes are used equally.

    The paper has no such term. Subtracting it from the loss keeps a small model from using only a few codes.
    """
    mean = logits.softmax(dim=1).mean(dim=(0, 2, 3))  # (k,)
    mean = mean.clamp(min=torch.finfo(mean.dtype).tiny)  # the gradient is infinite at 0
    return torch.special.entr(mean).sum()


def dvae_loss(
    images: Float[Tensor, "b 3 h w"],
    logits: Float[Tensor, "b k g g"],
    pixels: LogitLaplace,
    kl_weight: float,
    codebook_entropy_weight: float = 0.0,
    mse_weight: float = 0.0,
) -> dict[str, Tensor]:
    """Return the negative evidence lower bound per pixel and channel, and its terms (paper, eq. 1, appendix A.2).

    The paper divides the whole loss by the 256 * 256 * 3 values of an image. The mean KL of a position thus has the
    weight kl_weight * positions / (pixels * channels), which is kl_weight / 192 at eight-fold downsampling.

    Args:
        images: images in [0, 1].
        logits: codebook logits of the encoder.
        pixels: distribution of the pixels that the decoder returns.
        kl_weight: weight of the KL divergence, beta in the paper.
        codebook_entropy_weight: weight of `codebook_entropy`; 0 in the paper.
        mse_weight: weight of the mean squared error between images and reconstructions; 0 in the paper. It penalizes
            errors at edges, which the logit-Laplace density penalizes little more than errors in flat colors.
    """
    nll = logit_laplace_nll(images, pixels).mean()
    kl = kl_to_uniform(logits)  # (b, g, g)
    kl_per_pixel = kl.sum() / images.numel()
    entropy = codebook_entropy(logits)
    mse = F.mse_loss(pixels.image, images)
    return {
        "loss": nll + mse_weight * mse + kl_weight * kl_per_pixel - codebook_entropy_weight * entropy,
        "loss_pixels": nll,
        "mse": mse,
        "kl": kl.mean(),
        "codebook_entropy": entropy,
    }


def dalle_loss(
    text_logits: Float[Tensor, "b t v"],
    image_logits: Float[Tensor, "b i k"],
    text_tokens: Int[Tensor, "b t"],
    codes: Int[Tensor, "b i"] | Float[Tensor, "b i k"],
    image_weight: float,
) -> dict[str, Tensor]:
    """Return the cross-entropies of text and image, in nats, and their mean weighted 1 : image_weight.

    image_weight = 7 gives the paper's weights of 1/8 and 7/8 (section 2.2). The loss skips text padding, whose ids lie
    above the vocabulary; the paper does not say whether it does. `codes` may be probabilities over the codebook: the
    lowest possible image loss is then their entropy, not 0.
    """
    text_logits, image_logits = text_logits.float(), image_logits.float()
    is_pad = text_tokens >= text_logits.shape[-1]
    text = F.cross_entropy(
        text_logits.flatten(0, 1), text_tokens.masked_fill(is_pad, -100).flatten(), ignore_index=-100, reduction="sum"
    ) / (~is_pad).sum().clamp(min=1)
    image = F.cross_entropy(image_logits.flatten(0, 1), codes.flatten(0, 1))
    return {"loss": (text + image_weight * image) / (1 + image_weight), "loss_text": text, "loss_image": image}
