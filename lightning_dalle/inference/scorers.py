"""How well pictures fit a caption: what candidates are ranked by.

Knows images and a caption. Knows nothing of how the images were made.
"""

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_dalle.checkpoints import load_clip, weights_digest
from lightning_dalle.errors import UserError
from lightning_dalle.models.clip import CLIP


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


class CLIPScorer(nn.Module):
    """Cosine similarity of image and caption under a CLIP (paper, section 2.6)."""

    def __init__(self, clip: CLIP, name: str) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.identity = f"{name} {weights_digest(clip.network)}"

    @torch.no_grad()
    def score(self, images: Tensor, caption: str) -> Tensor:
        """Cosines (n,), in [-1, 1]."""
        image = self.clip.embed_images(images.to(self.clip.mean.device))  # (n, d)
        text = self.clip.embed_texts([caption])  # (1, d)
        return (image @ text.T)[:, 0].float().cpu()


class TrainedCLIP(CLIPScorer):
    """A CLIP that was trained here.

    Args:
        checkpoint: of a LitCLIP.

    Raises:
        UserError: if it is not there or holds no CLIP.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(load_clip(checkpoint), "CLIP")


class OpenCLIP(CLIPScorer):
    """A pretrained CLIP of open_clip's.

    Args:
        model: open_clip's name of the architecture, such as ViT-B-32.
        weights: open_clip's name of pretrained weights (downloaded once), or a local file. Files of OpenAI's weights
            need a model whose name ends in -quickgelu.

    Raises:
        UserError: if open_clip knows no such model, or the weights cannot be had.
    """

    def __init__(self, model: str, weights: str) -> None:
        import open_clip

        if model not in open_clip.list_models():
            raise UserError(f"open_clip has no model {model}; it has {', '.join(open_clip.list_models()[:8])}, ...")
        if weights not in open_clip.list_pretrained_tags_by_model(model) and not Path(weights).is_file():
            raise UserError(
                f"there is no file of CLIP weights at {weights}, and open_clip has none of that name for {model}"
            )
        # Some weights want another activation than the architecture of that name has; open_clip only warns.
        is_quick = bool((open_clip.get_pretrained_cfg(model, weights) or {}).get("quick_gelu"))
        try:
            tokenizer = open_clip.get_tokenizer(model)
            network = open_clip.create_model(model, pretrained=weights, force_quick_gelu=is_quick)
        except Exception as error:  # of the network, of the file or of weights that do not fit: it raises anything
            reason = str(error).partition("\n")[0]
            raise UserError(f"the CLIP weights {weights} of {model} cannot be had: {reason}") from error
        preprocess = open_clip.get_model_preprocess_cfg(network)
        super().__init__(CLIP(network, tokenizer, preprocess), model)


def open_clip_scorer(name: str) -> CLIPScorer:
    """What `--clip` names: a checkpoint of a LitCLIP, or open_clip's model and weights, as ViT-B-32:openai.

    Raises:
        UserError: if there is neither.
    """
    model, colon, weights = name.partition(":")
    if colon and not Path(name).is_file():
        return OpenCLIP(model, weights)
    if not Path(name).exists():
        import open_clip

        if tags := open_clip.list_pretrained_tags_by_model(name):
            raise UserError(f"{name} is a model of open_clip's, which needs its weights named too: {name}:{tags[0]}")
    return TrainedCLIP(Path(name))
