"""CLIP: an image tower and a text tower that meet in one space (Radford et al. 2021), by open_clip's classes.

Knows open_clip's network and its tokens. Knows nothing of training, of ranking or of where weights come from.
open_clip takes seconds to import, so only what builds a network does.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_dalle.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Shape of a CLIP; the defaults are open_clip's ViT-B-32."""

    image_size: int = 224
    """Height and width of the images, in pixels."""
    patch_size: int = 32
    """Side of the patches that the image tower reads, in pixels; must divide `image_size`."""
    vision_width: int = 768
    """Width of the image tower; a multiple of `head_width`."""
    vision_layers: int = 12
    """Blocks of the image tower."""
    text_width: int = 512
    """Width of the text tower; a multiple of `head_width`."""
    text_layers: int = 12
    """Blocks of the text tower."""
    head_width: int = 64
    """Width of an attention head in both towers."""
    embed_dim: int = 512
    """Width of the space in which the two meet."""
    text_len: int = 77
    """Tokens of a caption, the marks at its beginning and end included."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise UserError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})")
        for name in ("vision_width", "text_width"):
            if getattr(self, name) % self.head_width:
                raise UserError(f"{name} ({getattr(self, name)}) must be a multiple of head_width ({self.head_width})")
        if self.text_len < 3:
            raise UserError(f"text_len ({self.text_len}) must leave room for a token between the two marks")

    def as_open_clip(self) -> dict[str, Any]:
        """The same as open_clip writes it into a model's JSON."""
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


VOCAB_SIZE = 49408  # of CLIP's own BPE, which open_clip carries


class CLIP(nn.Module):
    """open_clip's CLIP with all that images and captions go through before it.

    Args:
        network: open_clip's module.
        tokenizer: open_clip's; a caption that is too long is cut before its end mark, which always stays.
        preprocess: open_clip's settings: size, mean and std of the images that the network was trained on.
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
    def new(cls, config: CLIPConfig) -> "CLIP":
        """An untrained one."""
        import open_clip

        network = open_clip.CLIP(**config.as_open_clip())
        preprocess = {
            "size": config.image_size, "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD
        }  # fmt: skip
        return cls(network, open_clip.SimpleTokenizer(context_length=config.text_len), preprocess)

    def export(self, folder: Path, config: CLIPConfig) -> None:
        """Writes it as open_clip reads it: `open_clip.create_model("local-dir:FOLDER")`."""
        folder.mkdir(parents=True, exist_ok=True)
        preprocess = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        described = {"model_cfg": config.as_open_clip(), "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(described, indent=2) + "\n")
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        save_file(weights, folder / "open_clip_model.safetensors")

    def tokens(self, captions: list[str]) -> Int[Tensor, "b t"]:
        """Captions as the text tower reads them, on the CLIP's device."""
        return self.tokenizer(captions).to(self.mean.device)

    def embed_images(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Unit vectors of images in [0, 1], resized bicubically where they are of another size."""
        if images.shape[-2:] != self.size:
            images = nn.functional.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.network.encode_image((images - self.mean) / self.std, normalize=True)  # type: ignore[operator]

    def embed_texts(self, captions: list[str]) -> Float[Tensor, "b d"]:
        """Unit vectors of captions."""
        return self.network.encode_text(self.tokens(captions), normalize=True)  # type: ignore[operator]
