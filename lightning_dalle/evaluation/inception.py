"""InceptionV3 of 2015, whose features define FID and KID, and the search for its weights file."""

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
"""Environment variable with the path of the Inception weights; `none` makes `fit` skip evaluations that need them."""

REMEDY = f"give torch-fidelity's weights file of release 0.2.0 in --inception or ${ENV_VAR}"


class Features(NamedTuple):
    """Inception features of n images."""

    pool: Float[Tensor, "n d"]
    """Output of Inception's last pooling layer; d is 2,048."""
    logits: Float[Tensor, "n 1008"] | None
    """Class logits; None if the weights file lacks Inception's last layer."""

    @staticmethod
    def join(parts: "list[Features]") -> "Features":
        """Join the features of several batches in order."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(torch.cat([part.pool for part in parts]), torch.cat(logits) if logits else None)

    def take(self, indices: list[int]) -> "Features":
        """Return the features of the images at these indices."""
        return Features(self.pool[indices], None if self.logits is None else self.logits[indices])


def is_disabled(path: Path | None = None) -> bool:
    """Return whether $LIGHTNING_DALLE_INCEPTION is `none` and no path is given."""
    return path is None and os.environ.get(ENV_VAR) == "none"


def find_local_weights(path: Path | None = None) -> Path | None:
    """Return `path`, else $LIGHTNING_DALLE_INCEPTION (`none`: None), else the file in torch hub's cache or None.

    Raises:
        UserError: if `path` or the environment variable names a file that does not exist.
    """
    if is_disabled(path):
        return None
    if named := path or os.environ.get(ENV_VAR):
        if not Path(named).is_file():
            raise UserError(f"there are no Inception weights at {named}: correct the path in --inception or ${ENV_VAR}")
        return Path(named)
    cached = _hub_file()
    return cached if cached.is_file() else None


def find_or_download_weights(path: Path | None = None) -> Path:
    """Return the file of `find_local_weights`; if there is none, download it into torch hub's cache.

    Raises:
        UserError: if the download fails, or if $LIGHTNING_DALLE_INCEPTION is `none` and no path is given.
    """
    if is_disabled(path):
        raise UserError(f"FID needs the Inception weights, but ${ENV_VAR} is none: unset it, or set it to a file")
    if (found := find_local_weights(path)) is not None:
        return found
    cached = _hub_file()
    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(cached), hash_prefix="6726825d")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download the Inception weights for FID ({error}): put the file {cached.name} of torch-fidelity's "
            f"release 0.2.0 into {cached.parent}, or set ${ENV_VAR} to its path; {ENV_VAR}=none makes `fit` skip "
            "evaluations that need these weights"
        ) from error
    return cached


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]


class Inception(FeatureExtractorInceptionV3):
    """InceptionV3 of torch-fidelity; if the weights lack its last layer, it returns no logits.

    Args:
        path: weights file of torch-fidelity or pytorch-fid, which use the same key names.

    Raises:
        UserError: if the file cannot be loaded, or lacks tensors of other layers.
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
            raise UserError(f"cannot load Inception weights from {path} ({reason}): {REMEDY}") from error

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the weights; only the last layer may be missing, which sets `has_logits` to False."""
        missing, unexpected = super().load_state_dict(state_dict, strict=False, assign=assign)
        self.has_logits = not any(name.startswith("fc.") for name in missing)
        wrong = [name for name in (*missing, *unexpected) if not name.startswith("fc.") and "num_batches" not in name]
        if wrong:
            raise UserError(
                f"the Inception weights have {len(wrong)} missing or unexpected tensors, such as {wrong[0]}: {REMEDY}"
            )
        return missing, unexpected

    @torch.no_grad()
    def features(self, images: UInt8[Tensor, "b 3 h w"]) -> Features:
        """Return the features of images of any size; the network resizes them to 299 x 299 as TensorFlow 1 did."""
        pool, logits = self(images)
        return Features(pool.cpu(), logits.cpu() if self.has_logits else None)
