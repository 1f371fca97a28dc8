"""CLIP: an image encoder and a text encoder with a shared embedding space (Radford et al. 2021), from open_clip.

open_clip takes seconds to import, so only functions that build a network import it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_dalle.errors import UserError
from lightning_dalle.files import make_folder, write_json

VOCAB_SIZE = 49408
"""Number of tokens of CLIP's BPE vocabulary, which is part of open_clip."""


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Shape of a CLIP; the defaults are open_clip's ViT-B-32."""

    image_size: int = 224
    """Height and width of the images, in pixels."""
    patch_size: int = 32
    """Side of the image encoder's patches, in pixels; must divide `image_size`."""
    vision_width: int = 768
    """Width of the image encoder; a multiple of `head_width`."""
    vision_layers: int = 12
    """Number of blocks of the image encoder."""
    text_width: int = 512
    """Width of the text encoder; a multiple of `head_width`."""
    text_layers: int = 12
    """Number of blocks of the text encoder."""
    head_width: int = 64
    """Width of an attention head in both encoders."""
    embed_dim: int = 512
    """Number of dimensions of the embedding space that images and texts share."""
    text_len: int = 77
    """Number of tokens to which captions are padded or truncated, with the start and end tokens."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise UserError(
                f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size}): change "
                "data.image_size or patch_size"
            )
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % self.head_width:
                raise UserError(f"{name} ({getattr(self, name)}) must be a multiple of head_width ({self.head_width})")
        if self.text_len < 3:
            raise UserError(f"text_len ({self.text_len}) must be at least 3: a start token, a token and an end token")

    def to_open_clip(self) -> dict[str, Any]:
        """Return the config as keyword arguments of `open_clip.CLIP`."""
        return {
            "embed_dim": self.embed_dim,
            "vision_cfg": {
                "image_size": self.image_size,
                "patch_size": self.patch_size,
                "width": self.vision_width,
                "layers": self.vision_layers,
                "head_width": self.head_width,
            },
            "text_cfg": {
                "context_length": self.text_len,
                "vocab_size": VOCAB_SIZE,
                "width": self.text_width,
                "heads": self.text_width // self.head_width,
                "layers": self.text_layers,
            },
        }


class CLIP(nn.Module):
    """open_clip's CLIP network with its tokenizer and its image preprocessing.

    Args:
        network: CLIP module of open_clip.
        tokenizer: tokenizer of open_clip, which truncates long captions but keeps the end token.
        preprocess: image size of the network, and mean and std of its inputs, in open_clip's format.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, tokenizer: Any, preprocess: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        size = preprocess["size"]
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self.register_buffer("mean", torch.tensor(preprocess["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess["std"]).view(3, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, config: CLIPConfig) -> "CLIP":
        """Create a CLIP with random weights."""
        import open_clip

        network = open_clip.CLIP(**config.to_open_clip())
        preprocess = {
            "size": config.image_size, "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD
        }  # fmt: skip
        return cls(network, open_clip.SimpleTokenizer(context_length=config.text_len), preprocess)

    def export(self, folder: Path, config: CLIPConfig) -> None:
        """Write a folder that `open_clip.create_model("local-dir:FOLDER")` loads."""
        make_folder(folder)
        preprocess = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        settings = {"model_cfg": config.to_open_clip(), "preprocess_cfg": preprocess}
        write_json(folder / "open_clip_config.json", settings)
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")

    def tokenize(self, captions: list[str]) -> Int[Tensor, "b t"]:
        """Return token ids of captions, on the network's device."""
        return self.tokenizer(captions).to(self.mean.device)

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return unit-length embeddings of images in [0, 1], which are resized bicubically to the network's size."""
        if images.shape[-2:] != self.size:
            images = nn.functional.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.network.encode_image((images - self.mean) / self.std, normalize=True)  # type: ignore[operator]

    def embed_texts(self, captions: list[str]) -> Float[Tensor, "b d"]:
        """Return unit-length embeddings of captions."""
        return self.network.encode_text(self.tokenize(captions), normalize=True)  # type: ignore[operator]
