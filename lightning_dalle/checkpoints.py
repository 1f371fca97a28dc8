"""Checkpoints of Lightning and safetensors files: their metadata, and how models are loaded from them.

A safetensors file has the same weights under the same names, and configs and tokenizer as JSON in its metadata, but no
training state. Loading raises a UserError if the file is missing, damaged, or lacks the model.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_dalle.errors import UserError
from lightning_dalle.models.clip import CLIP, CLIPConfig
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.dvae import DVAE, DVAEConfig
from lightning_dalle.tokenizer import CaptionTokenizer

Model = TypeVar("Model", bound=nn.Module)

METADATA_KEY = "lightning_dalle"
"""Key in a safetensors file's metadata, under which its configs and tokenizer are stored as JSON."""
FORMAT_VERSION = 2
"""Version of the training state in a checkpoint; checkpoints of format 1 lack the key `format_version`."""
METADATA = ("format_version", "dvae_config", "dalle_config", "clip_config", "tokenizer", "attribution")
"""Keys of a checkpoint that a safetensors file keeps besides the weights."""
NAMES = {"dvae": "dVAE", "dalle": "DALL-E", "clip": "CLIP"}
"""Name of each model in messages, by the prefix of its weights and of its config key."""


class LoadedDALLE(NamedTuple):
    """DALL-E with the dVAE and the tokenizer that it was trained with, in eval mode on the CPU."""

    dalle: DALLE
    dvae: DVAE
    tokenizer: CaptionTokenizer
    attribution: str | None


def dvae_metadata(dvae: DVAE) -> dict[str, Any]:
    """Return what a dVAE's checkpoint contains besides the weights, which have the prefix `dvae.`."""
    return {"format_version": FORMAT_VERSION, "dvae_config": asdict(dvae.config)}


def dalle_metadata(
    dalle: DALLE, dvae: DVAE, tokenizer: CaptionTokenizer | None, attribution: str | None
) -> dict[str, Any]:
    """Return what a DALL-E's checkpoint contains besides the weights, which have the prefixes `dalle.` and `dvae.`.

    `attribution` is the credit line that the licence of the training images requires on generated images, if any.
    """
    return {
        "dalle_config": asdict(dalle.config),
        "tokenizer": None if tokenizer is None else tokenizer.to_json(),
        "attribution": attribution,
        **dvae_metadata(dvae),
    }


def clip_metadata(config: CLIPConfig) -> dict[str, Any]:
    """Return what a CLIP's checkpoint contains besides the weights, which have the prefix `clip.`."""
    return {"format_version": FORMAT_VERSION, "clip_config": asdict(config)}


def load_clip(path: Path) -> CLIP:
    """Return the CLIP of a checkpoint, in eval mode on the CPU, with averaged weights if training averaged them."""
    return _load_model("clip", lambda config: CLIP.from_config(CLIPConfig(**config)), read_checkpoint(path), path)


def load_dvae(path: Path) -> DVAE:
    """Return the dVAE of a dVAE's or DALL-E's checkpoint, in eval mode on the CPU."""
    return _load_dvae(read_checkpoint(path), path)


def load_dalle(path: Path) -> LoadedDALLE:
    """Return the DALL-E of a checkpoint with its dVAE and tokenizer."""
    checkpoint = read_checkpoint(path)
    dalle = _load_model("dalle", lambda config: DALLE(DALLEConfig.from_dict(config)), checkpoint, path)
    tokenizer = CaptionTokenizer.from_json(checkpoint["tokenizer"])
    return LoadedDALLE(dalle, _load_dvae(checkpoint, path), tokenizer, checkpoint["attribution"])


def _load_dvae(checkpoint: dict[str, Any], path: Path) -> DVAE:
    return _load_model("dvae", lambda config: DVAE(DVAEConfig(**config)), checkpoint, path)


def _load_model(prefix: str, build: Callable[[Any], Model], checkpoint: dict[str, Any], path: Path) -> Model:
    if f"{prefix}_config" not in checkpoint:
        found = " and ".join(f"a {name}" for other, name in NAMES.items() if f"{other}_config" in checkpoint)
        found = found or "other models"
        raise UserError(f"a {NAMES[prefix]} checkpoint is needed, but {path} has only {found}: correct the path")
    try:
        model = build(checkpoint[f"{prefix}_config"])
    except TypeError as error:
        raise UserError(f"{path} is of another version of lightning_dalle, load it with that one: {error}") from error
    start = f"{prefix}."
    weights = {k.removeprefix(start): v for k, v in checkpoint["state_dict"].items() if k.startswith(start)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"the weights in {path} do not match its {prefix}_config; choose another checkpoint: {error}"
        ) from error
    return model.eval()


def check_dvae(user: str, dvae: DVAE, path: Path | None, **expected: int) -> None:
    """Raise a UserError if the config of the dVAE in `path` has other values than `user`, such as "the data", needs."""
    for name, value in expected.items():
        found = getattr(dvae.config, name)
        if found != value:
            remedy = f"set data.image_size to {found}, or " if name == "image_size" else ""
            raise UserError(
                f"{user}'s {name} is {value}, but the dVAE in {path} was trained with {name}={found}: "
                f"{remedy}choose another dVAE"
            )


def check_resumable(checkpoint: dict[str, Any], path: Path | str | None) -> None:
    """Raise a UserError if training cannot resume from a checkpoint because its format version differs.

    Only resuming calls this: generate, test and export read the weights of every format.
    """
    version = checkpoint.get("format_version", 1)
    if version != FORMAT_VERSION:
        remedy = ", or resume with commit 6ca43fc" if version == 1 else ""
        raise UserError(
            f"cannot resume from {path}: it has checkpoint format {version}, this version resumes format "
            f"{FORMAT_VERSION}; use it with generate/test/export{remedy}"
        )


def check_equal_config(found: Any, ours: Any, action: str) -> None:
    """Raise a UserError that lists the fields in which the model config of a checkpoint differs from this run's.

    `action` is what the difference forbids, such as "resume".
    """
    configs = (asdict(config) for config in (found, ours))
    theirs, mine = ({**config.pop("transformer", {}), **config} for config in configs)  # a DALLEConfig is nested
    different = [name for name in mine if theirs[name] != mine[name]]
    if different:
        differences = ", ".join(f"{name}={mine[name]} (checkpoint: {theirs[name]})" for name in different)
        raise UserError(f"cannot {action}: this config has {differences}; set it to the checkpoint's values")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint or safetensors file, on the CPU, without executing anything in it.

    Raises:
        UserError: if the file is missing, is not a checkpoint, or is a sharded checkpoint.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, so it is a sharded checkpoint; merge it into one file with "
            f"python -m lightning_fabric.utilities.consolidate_checkpoint {path}"
        )
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}: correct the path")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises any exception on bytes that are not a checkpoint
        # torch's own message advises to execute the file's code.
        reason = "it was not written by torch.save, or is truncated; choose another file"
        if zipfile.is_zipfile(path):
            reason = "it contains objects that only code in it can create, which is never run; choose another file"
        raise UserError(f"cannot read {path} as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} has no state_dict, so it is not a checkpoint of lightning_dalle: correct the path")
    return checkpoint


def write_safetensors(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write the models and the metadata of a checkpoint as a safetensors file, without training state."""
    items = checkpoint["state_dict"].items()
    weights = {name: tensor.contiguous() for name, tensor in items if name.partition(".")[0] in NAMES}
    metadata = {key: checkpoint[key] for key in METADATA if key in checkpoint}
    save_file(weights, path, {METADATA_KEY: json.dumps(metadata, ensure_ascii=False)})
    path.chmod(0o644)  # safetensors makes it readable by its owner alone


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise UserError(f"cannot read {path} as a safetensors file, choose another file: {error}") from error
    if metadata is None:
        raise UserError(
            f"{path} is not a model of lightning_dalle: its metadata lacks the key {METADATA_KEY}; give a file that "
            "`export` or `convert` wrote"
        )
    return {"state_dict": weights, **json.loads(metadata)}


def weights_digest(*models: nn.Module) -> str:
    """Return the SHA-256 of all weights and buffers in fp32, equal for a checkpoint and its export."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()
