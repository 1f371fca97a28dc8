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
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_dalle.errors import UserError
from lightning_dalle.models.clip import CLIP, CLIPConfig
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.dvae import DVAE, DVAEConfig
from lightning_dalle.tokenizer import CaptionTokenizer

METADATA_KEY = "lightning_dalle"
"""Key in a safetensors file's metadata, under which its configs and tokenizer are stored as JSON."""
FORMAT_VERSION = 2
"""Version of the training state in a checkpoint; checkpoints of format 1 lack the key `format_version`."""
METADATA = ("format_version", "dvae_config", "dalle_config", "clip_config", "tokenizer", "attribution", "global_step")
"""Keys of a checkpoint that a safetensors file keeps besides the weights."""
LIGHTNING = {"pytorch-lightning_version": "2.6.1", "global_step": 0}
"""Values of the keys that Lightning and evaluations need, for safetensors files without them; step 0 is unknown."""
NAMES = {"dvae": "dVAE", "dalle": "DALL-E", "clip": "CLIP"}
"""Name of each model in messages, by the prefix of its weights and of its config key."""
BUILDERS: dict[str, Callable[[Any], Any]] = {
    "dvae": lambda config: DVAE(DVAEConfig(**config)),
    "dalle": lambda config: DALLE(DALLEConfig.from_dict(config)),
    "clip": lambda config: CLIP.from_config(CLIPConfig(**config)),
}
"""Functions that create each model with random weights from the config in its checkpoint."""
DALLE_ONLY = {"dalle_config", "tokenizer", "attribution", "hyper_parameters"}
"""Keys of a DALL-E's checkpoint that do not concern its dVAE."""
LAYOUTS = ("{}/checkpoints/last.ckpt", "{}.safetensors")
"""Path of a model's file in the folders that `reproduce` and `export` write."""


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


def find_in_folder(folder: Path | str, model: str) -> Path | None:
    """Return the file of a model ("dvae", "dalle" or "clip") in a folder of `reproduce` or `export`, or None."""
    names = (model, "dalle") if model == "dvae" else (model,)  # the file of a DALL-E contains its dVAE
    files = (Path(folder, layout.format(name)) for name in names for layout in LAYOUTS)
    return next((file for file in files if file.is_file()), None)


def resolve_checkpoint(path: Path | str, model: str) -> Path:
    """Return a model's file in a folder of `reproduce` or `export`; return files and sharded checkpoints unchanged."""
    if not Path(path).is_dir() or Path(path, ".metadata").is_file():
        return Path(path)
    if file := find_in_folder(path, model):
        return file
    files = " nor ".join(layout.format(model) for layout in LAYOUTS)
    raise UserError(f"{path} has no {NAMES[model]}, neither {files}: give a checkpoint, or a folder of a run or export")


def load_clip(path: Path | str) -> CLIP:
    """Return the CLIP of a checkpoint, in eval mode on the CPU, with averaged weights if training averaged them."""
    clip: CLIP = _load_model("clip", read_checkpoint(path, "clip"))
    return clip


def load_dvae(path: Path | str) -> DVAE:
    """Return the dVAE of a dVAE's or DALL-E's checkpoint, in eval mode on the CPU."""
    dvae: DVAE = _load_model("dvae", read_checkpoint(path, "dvae"))
    return dvae


def load_dalle(path: Path | str) -> LoadedDALLE:
    """Return the DALL-E of a checkpoint with its dVAE and tokenizer."""
    checkpoint = read_checkpoint(path, "dalle")
    if checkpoint["tokenizer"] is None:
        raise UserError(f"{path} has no tokenizer, as sampling needs: train with LitDALLE(tokenizer=...)")
    dalle, dvae = (_load_model(model, checkpoint) for model in ("dalle", "dvae"))
    return LoadedDALLE(dalle, dvae, CaptionTokenizer.from_json(checkpoint["tokenizer"]), checkpoint["attribution"])


def _load_model(model: str, checkpoint: dict[str, Any]) -> Any:
    module, start = BUILDERS[model](checkpoint[f"{model}_config"]), f"{model}."
    items = checkpoint["state_dict"].items()
    module.load_state_dict({name.removeprefix(start): weight for name, weight in items if name.startswith(start)})
    return module.eval()


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


def read_checkpoint(path: Path | str, model: str | None = None) -> dict[str, Any]:
    """Return the content of a checkpoint or safetensors file, on the CPU, without executing anything in it.

    Args:
        path: file, or with `model` also a folder that `reproduce` or `export` wrote.
        model: model that the file must contain, "dvae", "dalle" or "clip"; "dvae" leaves out the rest of a DALL-E's.

    Raises:
        UserError: if the file is missing, is not a checkpoint, is a sharded one, or lacks the model or a needed key, or
            if configs, tokenizer or the shapes of weights are damaged.
    """
    path = Path(path) if model is None else resolve_checkpoint(path, model)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, so it is a sharded checkpoint; merge it into one file with "
            f"python -m lightning_fabric.utilities.consolidate_checkpoint {path}"
        )
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}: correct the path")
    checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    _check_content(checkpoint, path)
    if model is not None and f"{model}_config" not in checkpoint:
        found = " and ".join(f"a {name}" for other, name in NAMES.items() if f"{other}_config" in checkpoint)
        found = found or "other models"
        raise UserError(f"a {NAMES[model]} checkpoint is needed, but {path} has only {found}: correct the path")
    if model == "dvae" and "dalle_config" in checkpoint:
        checkpoint = {key: checkpoint[key] for key in checkpoint.keys() - DALLE_ONLY}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("dvae.")}
    return checkpoint


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises any exception on bytes that are not a checkpoint
        # torch's own message advises to execute the file's code.
        reason = "it was not written by torch.save, or is truncated; choose another file"
        if zipfile.is_zipfile(path):
            reason = "it contains objects that only code in it can create, which is never run; choose another file"
        raise UserError(f"cannot read {path} as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path} has no state_dict, so it is not a checkpoint of lightning_dalle: correct the path")
    return checkpoint


def _check_content(checkpoint: dict[str, Any], path: Path) -> None:
    """Raise a UserError if the format is newer, a key is missing, or a config, tokenizer or weight is damaged."""
    version = checkpoint.get("format_version", 1)
    if type(version) is not int or version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version={version!r}, but this version of lightning_dalle reads 1 to {FORMAT_VERSION}: "
            "update lightning_dalle, or choose another checkpoint"
        )
    for key in ("dvae_config", "tokenizer", "attribution") if "dalle_config" in checkpoint else ():
        if key not in checkpoint:
            raise UserError(f"{path} has a dalle_config, but lacks the key {key}: choose another checkpoint")
    key, weights = "", checkpoint["state_dict"].items()
    needed: dict[str, tuple[int, ...]] = {}
    try:
        if checkpoint.get("tokenizer") is not None:
            key = "tokenizer"
            CaptionTokenizer.from_json(checkpoint[key])
            checkpoint["CaptionedImageDataModule"] = {key: checkpoint[key]}  # read by Lightning
        for model in [name for name in NAMES if f"{name}_config" in checkpoint]:
            key = f"{model}_config"
            with torch.device("meta"):
                shapes = BUILDERS[model](checkpoint[key]).state_dict().items()
            needed |= {f"{model}.{name}": tuple(value.shape) for name, value in shapes}
    except UserError as error:
        raise UserError(f"cannot use the {key} in {path}: {error}") from error
    except Exception as error:  # damaged values can raise any exception
        raise UserError(
            f"the {key} in {path} is {checkpoint[key]!r:.400}, which this version of lightning_dalle cannot use "
            f"({error}): load it with the version that wrote it, or choose another checkpoint"
        ) from error
    models = {name.partition(".")[0] for name in needed}
    found = {name: tuple(value.shape) for name, value in weights if name.partition(".")[0] in models}
    if different := [name for name in needed | found if needed.get(name) != found.get(name)]:
        name = different[0]
        raise UserError(
            f"the weights in {path} do not fit its configs: {name} has shape {found.get(name)}, but {needed.get(name)} "
            f"is needed ({len(different)} weights differ); choose another checkpoint"
        )


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
            text = (file.metadata() or {}).get(METADATA_KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        metadata = None if text is None else dict(json.loads(text))
    except (SafetensorError, ValueError, TypeError) as error:
        raise UserError(
            f"cannot read {path} as a safetensors file with JSON under the metadata key {METADATA_KEY}, choose another "
            f"file: {error}"
        ) from error
    if metadata is None:
        raise UserError(
            f"{path} is not a model of lightning_dalle: its metadata lacks the key {METADATA_KEY}; give a file that "
            "`export` or `convert` wrote"
        )
    return {**LIGHTNING, **metadata, "state_dict": weights}


def weights_digest(*models: nn.Module) -> str:
    """Return the SHA-256 of all weights and buffers in fp32, equal for a checkpoint and its export."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()
