"""Losses as pure functions of tensors, each beside its equation.

Knows the paper's formulas. Knows nothing of modules, schedules or logging.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_dalle.models.dvae import LogitLaplace, map_pixels


def logit_laplace_nll(images: Float[Tensor, "b 3 h w"], pixels: LogitLaplace) -> Float[Tensor, "b 3 h w"]:
    """Negative log-density of the mapped pixels, in nats (paper, eq. 2).

    f(x | mu, b) = 1 / (2 b x (1 - x)) * exp(-|logit(x) - mu| / b)
    """
    x = map_pixels(images)
    error = (torch.logit(x) - pixels.mu).abs()
    return error * torch.exp(-pixels.log_scale) + pixels.log_scale + math.log(2) + torch.log(x * (1 - x))


def kl_to_uniform(logits: Float[Tensor, "b k g g"]) -> Float[Tensor, "b g g"]:
    """KL of the encoder's categorical to the uniform prior at each grid position, in nats: ln K minus the entropy.

    Of the logits as they are, whatever the temperature of the relaxation (openai/DALL-E issue 26).
    """
    log_q = logits.log_softmax(dim=1)
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(dim=1)


def usage_entropy(logits: Float[Tensor, "b k g g"]) -> Float[Tensor, ""]:
    """Entropy of the batch's mean posterior, in nats: ln K when the batch uses all codes alike.

    Not in the paper. As a bonus it keeps a small model from using a handful of codes.
    """
    mean = logits.softmax(dim=1).mean(dim=(0, 2, 3))  # (k,)
    mean = mean.clamp(min=torch.finfo(mean.dtype).tiny)  # at 0, which a sure encoder reaches, the slope is infinite
    return torch.special.entr(mean).sum()


def dvae_loss(
    images: Float[Tensor, "b 3 h w"],
    logits: Float[Tensor, "b k g g"],
    pixels: LogitLaplace,
    kl_weight: float,
    usage_bonus: float = 0.0,
    mse_weight: float = 0.0,
) -> dict[str, Tensor]:
    """The negative ELB per pixel and channel, KL weighted (paper, eq. 1 and appendix A.2), by parts.

    The paper divides the whole loss by 256 * 256 * 3. So the mean KL of a position weighs
    kl_weight * positions / (pixels * channels), which is kl_weight / 192 at eight-fold downsampling.

    Args:
        images: in [0, 1].
        logits: of the encoder.
        pixels: the reconstruction.
        kl_weight: beta.
        usage_bonus: weight of `usage_entropy`; 0 in the paper.
        mse_weight: of the squared error of the reconstruction in [0, 1]; 0 in the paper. The density is that of the
            logit, in which an error at an edge costs little more than one in a flat colour.
    """
    nll = logit_laplace_nll(images, pixels).mean()
    kl = kl_to_uniform(logits)  # (b, g, g)
    kl_per_pixel = kl.sum() / images.numel()
    usage = usage_entropy(logits)
    mse = F.mse_loss(pixels.image, images)
    return {
        "loss": nll + mse_weight * mse + kl_weight * kl_per_pixel - usage_bonus * usage,
        "loss_pixels": nll,
        "mse": mse,
        "kl": kl.mean(),
        "usage_entropy": usage,
    }


def dalle_loss(
    text_logits: Float[Tensor, "b t v"],
    image_logits: Float[Tensor, "b i k"],
    text_tokens: Int[Tensor, "b t"],
    codes: Int[Tensor, "b i"] | Float[Tensor, "b i k"],
    image_weight: float,
) -> dict[str, Tensor]:
    """Cross-entropies of text and image, each averaged over its own tokens, weighted 1 : image_weight, in nats.

    The paper's weights of 1/8 and 7/8 (section 2.2) are image_weight = 7. Padding, whose ids lie above the text
    vocabulary, is no token of the caption and is not predicted; the paper leaves that open. Codes may be given as
    probabilities: then the least loss of the image is their entropy, not 0.
    """
    text_logits, image_logits = text_logits.float(), image_logits.float()
    is_pad = text_tokens >= text_logits.shape[-1]
    text = F.cross_entropy(
        text_logits.flatten(0, 1), text_tokens.masked_fill(is_pad, -100).flatten(), ignore_index=-100, reduction="sum"
    ) / (~is_pad).sum().clamp(min=1)
    image = F.cross_entropy(image_logits.flatten(0, 1), codes.flatten(0, 1))
    return {"loss": (text + image_weight * image) / (1 + image_weight), "loss_text": text, "loss_image": image}
