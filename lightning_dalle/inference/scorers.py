"""Scorers: models such as a CLIP that rate how well images fit a caption, by which candidates are ranked."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_dalle.checkpoints import load_clip, weights_digest
from lightning_dalle.errors import UserError
from lightning_dalle.models.clip import CLIP


@runtime_checkable
class Scorer(Protocol):
    """Interface of a model that scores how well images fit a caption; a config names it by `class_path`."""

    def score(self, images: Tensor, caption: str) -> Tensor:
        """Return scores (n,), on the CPU, of images (n, 3, h, w) in [0, 1]; higher is better."""
        ...


def fingerprint(scorer: Scorer | None) -> str | None:
    """Return a scorer's class and its attribute `fingerprint`, if any, as one text that identifies it in results."""
    if scorer is None:
        return None
    name = f"{type(scorer).__module__}.{type(scorer).__qualname__}"
    return f"{name} {getattr(scorer, 'fingerprint', '')}".strip()


class CLIPScorer(nn.Module):
    """Scorer by the cosine similarity of the image and caption embeddings of a CLIP (section 2.6)."""

    def __init__(self, clip: CLIP, name: str) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.fingerprint = f"{name} {weights_digest(clip.network)}"

    @classmethod
    def from_checkpoint(cls, checkpoint: Path | str) -> "CLIPScorer":
        """Load a CLIP that was trained with this package.

        Args:
            checkpoint: checkpoint of a LitCLIP, its file written by `export`, or folder of a run or an export.
        """
        return cls(load_clip(checkpoint), "CLIP")

    @torch.no_grad()
    def score(self, images: Tensor, caption: str) -> Tensor:
        """Return the cosine similarity (n,) of each image and the caption, in [-1, 1]."""
        image = self.clip.embed_images(images.to(self.clip.mean.device))  # (n, d)
        text = self.clip.embed_texts([caption])  # (1, d)
        return (image @ text.T)[:, 0].float().cpu()


class OpenCLIP(CLIPScorer):
    """Scorer with a pretrained CLIP of the open_clip package.

    Args:
        model: open_clip's name of the architecture, such as ViT-B-32.
        weights: open_clip's name of pretrained weights (downloaded once), or a local file. OpenAI's weight files
            need a model whose name ends in -quickgelu.
    """

    def __init__(self, model: str, weights: str) -> None:
        import open_clip

        if model not in open_clip.list_models():
            raise UserError(
                f"open_clip has no model {model}: give one of {', '.join(open_clip.list_models()[:8])}, ..."
            )
        names = open_clip.list_pretrained_tags_by_model(model)
        if weights not in names and not Path(weights).is_file():
            raise UserError(
                f"the CLIP weights {weights} are neither a file nor open_clip's weights of {model}: give a file"
                + (f", or one of {', '.join(names)}" if names else "")
            )
        # Some weights need another activation than the architecture of that name has; open_clip only warns.
        is_quick = bool((open_clip.get_pretrained_cfg(model, weights) or {}).get("quick_gelu"))
        try:
            tokenizer = open_clip.get_tokenizer(model)
            network = open_clip.create_model(model, pretrained=weights, force_quick_gelu=is_quick)
        except Exception as error:  # open_clip raises many kinds: network, file or shape errors
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"cannot load the CLIP weights {weights} into {model} ({reason}): give other weights"
            ) from error
        preprocess = open_clip.get_model_preprocess_cfg(network)
        super().__init__(CLIP(network, tokenizer, preprocess), model)


def load_scorer(name: str | Path) -> CLIPScorer:
    """Load a CLIP that scores how well images fit a caption.

    Args:
        name: checkpoint of a CLIP trained by this package, folder of a run or an export with one, or MODEL:WEIGHTS of
            open_clip, such as ViT-B-32:openai.
    """
    name = str(name)
    model, colon, weights = name.partition(":")
    if colon and not Path(name).exists():
        return OpenCLIP(model, weights)
    if not Path(name).exists():
        import open_clip

        if names := open_clip.list_pretrained_tags_by_model(name):
            raise UserError(f"the open_clip model {name} needs weights: give MODEL:WEIGHTS, such as {name}:{names[0]}")
    return CLIPScorer.from_checkpoint(name)
