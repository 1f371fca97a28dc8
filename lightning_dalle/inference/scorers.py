"""How well pictures fit a caption: what candidates are ranked by.

Knows images and a caption. Knows nothing of how the images were made.
"""

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dalle.checkpoints import weights_digest
from lightning_dalle.errors import UserError


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores images against a caption; higher is better. Another one fits by its class_path."""

    def score(self, images: Tensor, caption: str) -> Tensor:
        """Scores (n,), on the CPU, of images (n, 3, h, w) in [0, 1]."""
        ...


def identity(scorer: Scorer | None) -> str | None:
    """What scores depend on besides image and caption: the class and, where it says them, its model and weights."""
    if scorer is None:
        return None
    kind = f"{type(scorer).__module__}.{type(scorer).__qualname__}"
    return f"{kind} {getattr(scorer, 'identity', '')}".strip()


class OpenCLIP(nn.Module):
    """Cosine similarity of image and caption under a CLIP of open_clip's (paper, section 2.6).

    Args:
        model: open_clip's name of the architecture, such as ViT-B-32.
        weights: open_clip's name of pretrained weights (downloaded once), or a local file.

    Raises:
        UserError: if open_clip knows no such model, or the weights cannot be had.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str, weights: str) -> None:
        import open_clip

        super().__init__()

        if model not in open_clip.list_models():
            raise UserError(f"open_clip has no model {model}; it has {', '.join(open_clip.list_models()[:8])}, ...")
        if weights not in open_clip.list_pretrained_tags_by_model(model) and not Path(weights).is_file():
            raise UserError(
                f"there is no file of CLIP weights at {weights}, and open_clip has none of that name for {model}"
            )
        try:
            self.clip = open_clip.create_model(model, pretrained=weights).eval().requires_grad_(False)
        except Exception as error:  # of the network, of the file or of weights that do not fit: it raises anything
            reason = str(error).partition("\n")[0]
            raise UserError(f"the CLIP weights {weights} of {model} cannot be had: {reason}") from error
        self.tokenizer = open_clip.get_tokenizer(model)
        config = open_clip.get_model_preprocess_cfg(self.clip)
        size = config["size"]
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))
        self.identity = f"{model} {weights_digest(self.clip)}"

    @torch.no_grad()
    def score(self, images: Tensor, caption: str) -> Tensor:
        """Cosines (n,), in [-1, 1]; images are resized bicubically to CLIP's size."""
        images = images.to(self.mean.device)
        resized = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        image = self.clip.encode_image((resized - self.mean) / self.std, normalize=True)  # (n, d)
        text = self.clip.encode_text(self.tokenizer([caption]).to(self.mean.device), normalize=True)  # (1, d)
        return (image @ text.T)[:, 0].float().cpu()
