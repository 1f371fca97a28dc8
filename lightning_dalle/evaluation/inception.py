"""The InceptionV3 of 2015 whose features FID, KID, precision and recall are defined on, and where its weights are.

Knows files and torch-fidelity's network. Knows nothing of what is measured with the features.
"""

import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from lightning_dalle.errors import UserError

VARIABLE = "LIGHTNING_DALLE_INCEPTION"


class Features(NamedTuple):
    """What Inception makes of n images; the logits are missing where the weights have no last layer."""

    pool: Float[Tensor, "n d"]
    """2,048 wide, by the network."""
    logits: Float[Tensor, "n 1008"] | None

    @staticmethod
    def join(parts: "list[Features]") -> "Features":
        """Of one set of images, in the order of the parts."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(torch.cat([part.pool for part in parts]), torch.cat(logits) if logits else None)

    def take(self, indices: list[int]) -> "Features":
        """Those of some images, in that order."""
        return Features(self.pool[indices], None if self.logits is None else self.logits[indices])


def is_declined(path: Path | None = None) -> bool:
    """Whether $LIGHTNING_DALLE_INCEPTION is `none`, and no file is given that would count more."""
    return path is None and os.environ.get(VARIABLE) == "none"


def weights_at_hand(path: Path | None = None) -> Path | None:
    """The file of weights, or None if there is none on this machine, or none wanted: the one given, the one that
    $LIGHTNING_DALLE_INCEPTION names, or torch hub's.

    Raises:
        UserError: if a file is named that is not there.
    """
    if is_declined(path):
        return None
    if path is None and os.environ.get(VARIABLE):
        path = Path(os.environ[VARIABLE])
    if path is not None:
        if not path.is_file():
            raise UserError(f"there are no Inception weights at {path}")
        return path
    cached = _hub_file()
    return cached if cached.is_file() else None


def find_weights(path: Path | None = None) -> Path:
    """The weights at hand; where there are none torch hub downloads them, once.

    Raises:
        UserError: if there is no file, with where to put it, or none is wanted.
    """
    if is_declined(path):
        raise UserError(f"FID is measured by the Inception weights, but ${VARIABLE} is none: unset it, or name a file")
    found = weights_at_hand(path)
    if found is not None:
        return found
    cached = _hub_file()
    cached.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(cached), hash_prefix="6726825d")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the Inception weights, which FID is measured by, cannot be downloaded here ({error}): put the file "
            f"{cached.name} of torch-fidelity's release 0.2.0 into {cached.parent}, or name a copy of it in "
            f"${VARIABLE}; {VARIABLE}=none makes fits leave these evaluations out"
        ) from error
    return cached


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]


class Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's network, with weights that may lack the last layer.

    Args:
        path: the weights, in the key names of pytorch-fid and torch-fidelity.

    Raises:
        UserError: if the file is not of this network.
    """

    def __init__(self, path: Path) -> None:
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.has_logits = True
        try:
            torch.load(path, map_location="cpu", weights_only=True)  # tensors only, before the parent opens it freely
            super().__init__("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
        except UserError:
            raise
        except Exception as error:  # of bytes that are no weights the unpickler raises anything
            reason = str(error).partition("\n")[0] or "it is empty"
            raise UserError(f"{path} does not hold Inception weights that can be opened: {reason}") from error

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As always, but for a last layer that is not there: then there are no logits."""
        missing, unexpected = super().load_state_dict(state_dict, strict=False, assign=assign)
        self.has_logits = not any(name.startswith("fc.") for name in missing)
        wrong = [name for name in (*missing, *unexpected) if not name.startswith("fc.") and "num_batches" not in name]
        if wrong:
            raise UserError(
                f"the Inception weights differ from the network in {len(wrong)} tensors, such as {wrong[0]}"
            )
        return missing, unexpected

    @torch.no_grad()
    def features(self, images: UInt8[Tensor, "b 3 h w"]) -> Features:
        """Of images in 0 to 255, of any size: the network resizes them as TensorFlow 1 did."""
        pool, logits = self(images)
        return Features(pool.cpu(), logits.cpu() if self.has_logits else None)
