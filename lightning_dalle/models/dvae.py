"""Discrete VAE: images to a grid of codes and back (paper, section 2.1 and appendix A).

Modules are named as in openai/DALL-E, so that OpenAI's weights can be loaded by name.
"""

import itertools
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from lightning_dalle.errors import UserError

LOGIT_LAPLACE_EPSILON = 0.1  # paper, appendix A.3


@dataclass(frozen=True, kw_only=True)
class DVAEConfig:
    """Shape of the discrete VAE; the defaults are the paper's."""

    image_size: int = 256
    """Height and width of the images, in pixels."""
    codebook_size: int = 8192
    """Number of different codes, K in the paper."""
    n_group: int = 4
    """Number of groups of residual blocks; each but the last halves the encoder's resolution."""
    patch: int = 1
    """Side in pixels of the patches that become channels of the encoder's input and the decoder's output; 1 in the
    paper. Larger patches leave fewer positions to compute, so that small models train faster."""
    n_block: int = 2
    """Number of residual blocks per group."""
    n_hid: int = 256
    """Number of channels at the highest resolution; doubled each time the resolution is halved."""
    n_init: int = 128
    """Number of channels of the decoder's first layer, the embedding of a code."""
    min_log_scale: float | None = None
    """Lower bound of ln b in the logit-Laplace density; None, as in the paper, for no bound. Without one, flat colors
    drive b to zero, and their errors then outweigh errors at edges, where b is large."""
    block_gain: float | None = None
    """Factor on a block's residual path; None for openai/DALL-E's 1 / (n_group * n_block)^2."""
    center_inputs: bool = False
    """Whether the encoder's inputs are rescaled from openai/DALL-E's [0.1, 0.9] to [-0.8, 0.8], which speeds up short
    trainings."""

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.image_size % self.downsampling:
            raise UserError(
                f"image_size ({self.image_size}) must be a positive multiple of {self.downsampling}, the downsampling "
                f"of patch={self.patch} and n_group={self.n_group}: change data.image_size"
            )
        if self.n_hid % 4:
            raise UserError(f"n_hid ({self.n_hid}) must be a multiple of 4, since a block has n_hid / 4 inner channels")

    @property
    def downsampling(self) -> int:
        """Number of pixels per code, along one side."""
        return self.patch * 2 ** (self.n_group - 1)

    @property
    def post_gain(self) -> float:
        """Factor on a block's residual path: `block_gain`, or openai/DALL-E's if it is None."""
        return (self.n_group * self.n_block) ** -2 if self.block_gain is None else self.block_gain

    @property
    def grid(self) -> int:
        """Number of codes along one side of an image."""
        return self.image_size // self.downsampling


def map_pixels(images: Tensor) -> Tensor:
    """Map images from [0, 1] to [eps, 1 - eps], where the logit is finite (paper, eq. 3)."""
    return (1 - 2 * LOGIT_LAPLACE_EPSILON) * images + LOGIT_LAPLACE_EPSILON


def unmap_pixels(mapped: Tensor) -> Tensor:
    """Invert `map_pixels` and clamp to [0, 1], as openai/DALL-E does."""
    return ((mapped - LOGIT_LAPLACE_EPSILON) / (1 - 2 * LOGIT_LAPLACE_EPSILON)).clamp(0, 1)


class Conv(nn.Conv2d):
    """Convolution that keeps the image size; its initial weights are N(0, 1/(n_in kernel^2)), as in openai/DALL-E."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__(n_in, n_out, kernel, padding=kernel // 2)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=(self.in_channels * self.kernel_size[0] ** 2) ** -0.5)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def embed_codes(self, codes: Int[Tensor, "b h w"]) -> Float[Tensor, "b n_out h w"]:
        """Return the 1x1 convolution of the codes' one-hot vectors, by looking up columns of the weight matrix."""
        assert self.bias is not None
        table = self.weight[:, :, 0, 0].T  # (n_in, n_out)
        return (F.embedding(codes, table) + self.bias).movedim(-1, 1)


class ResBlock(nn.Module):
    """Bottleneck residual block of openai/DALL-E: four pairs of ReLU and convolution, scaled by `post_gain`."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], post_gain: float) -> None:
        super().__init__()
        n_hid = n_out // 4
        widths = (n_in, n_hid, n_hid, n_hid, n_out)
        self.post_gain = post_gain
        self.id_path = Conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential()
        for i, kernel in enumerate(kernels):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            self.res_path.add_module(f"conv_{i + 1}", Conv(widths[i], widths[i + 1], kernel))

    def forward(self, x: Float[Tensor, "b n_in h w"]) -> Float[Tensor, "b n_out h w"]:
        return self.id_path(x) + self.post_gain * self.res_path(x)


def group(widths: list[int], kernels: tuple[int, int, int, int], post_gain: float) -> nn.Sequential:
    """Return a chain of residual blocks, each from one of `widths` (numbers of channels) to the next."""
    blocks = [ResBlock(n_in, n_out, kernels, post_gain) for n_in, n_out in itertools.pairwise(widths)]
    return nn.Sequential(OrderedDict((f"block_{i + 1}", block) for i, block in enumerate(blocks)))


class Encoder(nn.Module):
    """Encoder of images to codebook logits: a 7x7 convolution, groups of blocks with max-pooling, a 1x1 convolution."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.patch = config.patch
        kernel = 7 // config.patch | 1  # odd, and covers about 7 pixels
        self.blocks = nn.Sequential(OrderedDict(input=Conv(3 * config.patch**2, config.n_hid, kernel)))
        width = config.n_hid
        for i in range(config.n_group):
            n_out = config.n_hid * 2**i
            stage = group([width] + [n_out] * config.n_block, (3, 3, 3, 1), config.post_gain)
            if i < config.n_group - 1:
                stage.add_module("pool", nn.MaxPool2d(2))  # max-pooling gave the better ELB (paper, section 2.1)
            self.blocks.add_module(f"group_{i + 1}", stage)
            width = n_out
        self.blocks.add_module(
            "output", nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(width, config.codebook_size, 1)))
        )

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k g g"]:
        *features, output = self.blocks
        x = F.pixel_unshuffle(x, self.patch)  # (b, 3 patch^2, h / patch, w / patch)
        for stage in features:
            x = stage(x)
        with torch.autocast(x.device.type, enabled=False):  # the layers around the relaxation stay in fp32 (A.2)
            return output(x.float())


class Decoder(nn.Module):
    """Decoder of hard or relaxed codes to logit-Laplace parameters: the encoder's layers reversed, with upsampling."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.blocks = nn.Sequential(OrderedDict(input=Conv(config.codebook_size, config.n_init, 1)))
        width = config.n_init
        for i in range(config.n_group):
            n_out = config.n_hid * 2 ** (config.n_group - 1 - i)
            stage = group([width] + [n_out] * config.n_block, (1, 3, 3, 3), config.post_gain)
            if i < config.n_group - 1:
                stage.add_module("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
            self.blocks.add_module(f"group_{i + 1}", stage)
            width = n_out
        output = Conv(width, 6 * config.patch**2, 1)
        self.blocks.add_module("output", nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=output)))

    def forward(self, z: Float[Tensor, "b k g g"] | Int[Tensor, "b g g"]) -> Float[Tensor, "b 6 h w"]:
        embed, *stages = self.blocks
        assert isinstance(embed, Conv)
        with torch.autocast(z.device.type, enabled=False):
            x = embed(z.float()) if z.is_floating_point() else embed.embed_codes(z)
        for stage in stages:
            x = stage(x)
        return F.pixel_shuffle(x.float(), self.patch)


class LogitLaplace(NamedTuple):
    """Logit-Laplace distribution of `map_pixels(image)` at each pixel and channel (paper, eq. 2)."""

    mu: Float[Tensor, "b 3 h w"]
    log_scale: Float[Tensor, "b 3 h w"]

    @property
    def image(self) -> Float[Tensor, "b 3 h w"]:
        """Reconstructed image in [0, 1] (paper, appendix A.3)."""
        return unmap_pixels(torch.sigmoid(self.mu))


class DVAE(nn.Module):
    """Discrete VAE: compresses an image to a square grid of codes, and reconstructs the image from them."""

    def __init__(self, config: DVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self, images: Float[Tensor, "b 3 h w"], temperature: float, generator: Generator | None = None
    ) -> tuple[Float[Tensor, "b k g g"], LogitLaplace]:
        """Return the encoder's logits, and the distribution of the pixels that the decoder predicts from relaxed codes.

        Args:
            images: images in [0, 1].
            temperature: temperature of the Gumbel-softmax, above 0; relaxed codes become one-hot as it falls to 0.
            generator: source of the Gumbel noise, on the device of the images.
        """
        logits = self.encoder_logits(images)  # (b, k, g, g)
        z = gumbel_softmax(logits, temperature, generator)  # (b, k, g, g)
        return logits, self.reconstruct(z)

    def reconstruct(self, z: Float[Tensor, "b k g g"] | Int[Tensor, "b g g"]) -> LogitLaplace:
        """Return the distribution of the pixels that the decoder predicts from hard or relaxed codes."""
        mu, log_scale = self.decoder(z).chunk(2, dim=1)  # (b, 3, h, w) each
        if self.config.min_log_scale is not None:
            log_scale = log_scale.clamp(min=self.config.min_log_scale)
        return LogitLaplace(mu, log_scale)

    def encoder_logits(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k g g"]:
        """Return codebook logits per grid position for images in [0, 1]."""
        x = map_pixels(images)
        return self.encoder(2 * x - 1 if self.config.center_inputs else x)

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b g g"]:
        """Return the most likely codes of images in [0, 1], without noise (paper, section 2.2)."""
        return self.encoder_logits(images).argmax(dim=1)

    def decode(self, codes: Int[Tensor, "b g g"]) -> Float[Tensor, "b 3 h w"]:
        """Return the decoder's images in [0, 1] for the given codes."""
        return self.reconstruct(codes).image


def gumbel_softmax(
    logits: Float[Tensor, "b k g g"], temperature: float, generator: Generator | None = None
) -> Float[Tensor, "b k g g"]:
    """Return a relaxed sample of the categorical distribution over axis 1 (Jang et al. 2016; paper, section 2.1).

    `torch.nn.functional.gumbel_softmax` accepts no generator, so a resumed run could not repeat its noise.
    """
    return ((logits + gumbel_noise(logits, generator)) / temperature).softmax(dim=1)


def gumbel_noise(like: Tensor, generator: Generator | None = None) -> Tensor:
    """Return Gumbel noise of the shape of `like`; the argmax of logits plus this noise is a sample from their softmax.

    Two logarithms of uniform numbers take a quarter of the time of `exponential_` on a CPU.
    """
    uniform = torch.empty_like(like).uniform_(generator=generator).clamp_(min=torch.finfo(like.dtype).tiny)
    return -(-uniform.log()).log()
