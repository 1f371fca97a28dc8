"""The InceptionV3 of 2015 whose features FID, KID, precision and recall are defined on, and its file of weights."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from lightning_dalle.errors import UserError
from lightning_dalle.files import sha256

ENV_VAR = "LIGHTNING_DALLE_INCEPTION"
"""Environment variable with the path of the weights, or `none` for training without evaluations that need them."""


class Features(NamedTuple):
    """Inception features of n images."""

    pool: Float[Tensor, "n d"]
    """Pooled features, 2,048 wide."""
    logits: Float[Tensor, "n 1008"] | None
    """Logits; None if the weights lack the last layer."""

    @staticmethod
    def join(parts: "list[Features]") -> "Features":
        """Join the features of several batches."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(torch.cat([part.pool for part in parts]), torch.cat(logits) if logits else None)

    def take(self, indices: list[int]) -> "Features":
        """Return the features at these indices."""
        return Features(self.pool[indices], None if self.logits is None else self.logits[indices])


def is_disabled(path: Path | None = None) -> bool:
    """Return whether $LIGHTNING_DALLE_INCEPTION is `none` and no path is given."""
    return path is None and os.environ.get(ENV_VAR) == "none"


def find_local_weights(path: Path | None = None) -> Path | None:
    """Return the given file, the one $LIGHTNING_DALLE_INCEPTION names, or torch hub's; None if absent or disabled.

    Raises:
        UserError: if a named file does not exist.
    """
    if is_disabled(path):
        return None
    if path is None and os.environ.get(ENV_VAR):
        path = Path(os.environ[ENV_VAR])
    if path is not None:
        if not path.is_file():
            raise UserError(f"there are no Inception weights at {path}: correct the path in --inception or ${ENV_VAR}")
        return path
    cached = _hub_file()
    return cached if cached.is_file() else None


def find_or_download_weights(path: Path | None = None) -> Path:
    """Return the local weights; if there are none, torch hub downloads them once.

    Raises:
        UserError: if they cannot be downloaded or are disabled.
    """
    if is_disabled(path):
        raise UserError(f"FID needs the Inception weights, but ${ENV_VAR} is none: unset it, or set it to a file")
    found = find_local_weights(path)
    if found is not None:
        return found
    cached = _hub_file()
    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(cached), hash_prefix="6726825d")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download the Inception weights for FID ({error}): put the file {cached.name} of torch-fidelity's "
            f"release 0.2.0 into {cached.parent}, or set ${ENV_VAR} to a copy of it; {ENV_VAR}=none makes `fit` skip "
            "evaluations that need it"
        ) from error
    return cached


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]


class Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's network, with weights that may lack the last layer.

    Args:
        path: file of weights with the key names of pytorch-fid and torch-fidelity.

    Raises:
        UserError: if the file does not hold weights of this network.
    """

    def __init__(self, path: Path) -> None:
        self.sha256 = sha256(path)
        self.has_logits = True
        try:
            torch.load(path, map_location="cpu", weights_only=True)  # the parent's torch.load would run pickled code
            super().__init__("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
        except UserError:
            raise
        except Exception as error:  # torch.load raises exceptions of many types on corrupt files
            reason = str(error).partition("\n")[0] or "it is empty"
            raise UserError(f"cannot load Inception weights from {path} ({reason}): give another file") from error

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the weights strictly, except for a missing last layer: `has_logits` is then False."""
        missing, unexpected = super().load_state_dict(state_dict, strict=False, assign=assign)
        self.has_logits = not any(name.startswith("fc.") for name in missing)
        wrong = [name for name in (*missing, *unexpected) if not name.startswith("fc.") and "num_batches" not in name]
        if wrong:
            raise UserError(
                f"the file of Inception weights has {len(wrong)} missing or unexpected tensors, such as {wrong[0]}: "
                "give a file of torch-fidelity's release 0.2.0"
            )
        return missing, unexpected

    @torch.no_grad()
    def features(self, images: UInt8[Tensor, "b 3 h w"]) -> Features:
        """Return the features of images of any size; the network resizes them to 299 as TensorFlow 1 did."""
        pool, logits = self(images)
        return Features(pool.cpu(), logits.cpu() if self.has_logits else None)
