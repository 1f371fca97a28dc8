"""Files of weights to plain models: what a Lightning checkpoint of ours holds, and how it is opened.

The same, without the state of a training, is a safetensors file: the weights under the same names, and in its metadata
all that stands beside them.

Knows files and models. Knows nothing of training.
"""

import hashlib
import json
import zipfile
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

RECORD = "lightning_dalle"
"""In the metadata of a safetensors file, what a checkpoint keeps beside the weights, as JSON."""


class LoadedDALLE(NamedTuple):
    """All that turns a caption into a picture, in eval mode on the CPU."""

    dalle: DALLE
    dvae: DVAE
    tokenizer: CaptionTokenizer
    attribution: str | None


def dvae_record(dvae: DVAE) -> dict[str, Any]:
    """What a checkpoint keeps beside the weights of a dVAE, which it keeps under `dvae.`."""
    return {"dvae_config": asdict(dvae.config)}


def dalle_record(dalle: DALLE, dvae: DVAE, tokenizer: CaptionTokenizer, attribution: str | None) -> dict[str, Any]:
    """What a checkpoint keeps beside the weights of a DALL-E, under `dalle.`, and of its dVAE, under `dvae.`.

    The attribution is what the licence of the training pictures asks of everything made from them.
    """
    return {
        "dalle_config": asdict(dalle.config),
        "tokenizer": tokenizer.to_json(),
        "attribution": attribution,
        **dvae_record(dvae),
    }


def clip_record(config: CLIPConfig) -> dict[str, Any]:
    """What a checkpoint keeps beside the weights of a CLIP, which it keeps under `clip.`."""
    return {"clip_config": asdict(config)}


def load_clip(path: Path) -> CLIP:
    """The CLIP of a checkpoint, in eval mode on the CPU, its averaged weights where they were averaged.

    Raises:
        UserError: if there is no such file, or it is no checkpoint with a CLIP.
    """
    checkpoint = read_checkpoint(path)
    if "clip_config" not in checkpoint:
        raise UserError(f"a CLIP checkpoint is needed, but {path} holds no CLIP")
    try:
        clip = CLIP.new(CLIPConfig(**checkpoint["clip_config"]))
    except TypeError as error:
        raise UserError(f"{path} was written by another version of lightning_dalle: {error}") from error
    _load_weights(clip, checkpoint, "clip.", path)
    return clip.eval()


def load_dvae(path: Path) -> DVAE:
    """The dVAE of a checkpoint of either model, its averaged weights where they were averaged.

    Raises:
        UserError: if there is no such file, or it is no checkpoint with a dVAE.
    """
    return _dvae(read_checkpoint(path), path)


def load_dalle(path: Path) -> LoadedDALLE:
    """The DALL-E of a checkpoint with the dVAE and the tokenizer that it was trained with.

    Raises:
        UserError: if there is no such file, or it is no checkpoint with a DALL-E.
    """
    checkpoint = read_checkpoint(path)
    if "dalle_config" not in checkpoint:
        kind = "a dVAE's checkpoint" if "dvae_config" in checkpoint else "a checkpoint without a DALL-E"
        raise UserError(f"a DALL-E checkpoint is needed, but {path} is {kind}")
    try:
        dalle = DALLE(DALLEConfig.from_dict(checkpoint["dalle_config"]))
    except TypeError as error:
        raise UserError(f"{path} was written by another version of lightning_dalle: {error}") from error
    _load_weights(dalle, checkpoint, "dalle.", path)
    tokenizer = CaptionTokenizer.from_json(checkpoint["tokenizer"])
    return LoadedDALLE(dalle.eval(), _dvae(checkpoint, path), tokenizer, checkpoint["attribution"])


def check_fit(dalle: DALLE, dvae: DVAE, path: Path) -> None:
    """Raises a UserError if a DALL-E does not speak the codes of the dVAE in `path`."""
    for name, ours, theirs in (
        ("grid", dalle.config.grid, dvae.config.grid),
        ("codebook_size", dalle.config.codebook_size, dvae.config.codebook_size),
    ):
        if ours != theirs:
            raise UserError(f"the transformer has {name}={ours}, but the dVAE in {path} has {name}={theirs}")


def check_image_size(dvae: DVAE, image_size: int, path: Path | None) -> None:
    """Raises a UserError if the data's pictures are not of the size that the dVAE in `path` reads."""
    if dvae.config.image_size != image_size:
        raise UserError(
            f"the data's image_size is {image_size}, but the dVAE in {path} was trained with "
            f"image_size={dvae.config.image_size}"
        )


def check_same(found: Any, ours: Any) -> None:
    """Raises a UserError that names the fields in which the config of a checkpoint to go on from is not this run's."""
    theirs, mine = (_flat(asdict(config)) for config in (found, ours))
    other = [name for name in mine if theirs[name] != mine[name]]
    if other:
        has, wants = (", ".join(f"{name}={values[name]}" for name in other) for values in (theirs, mine))
        raise UserError(f"the checkpoint to go on from has {has}, but this run {wants}")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of fields beside the others."""
    parts = (_flat(value) if isinstance(value, dict) else {name: value} for name, value in values.items())
    return {name: value for part in parts for name, value in part.items()}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint or of a safetensors file, on the CPU; nothing in the file is executed.

    Raises:
        UserError: if there is no such file, or it is no checkpoint, or one in parts.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, a checkpoint in parts, but one file is needed: make it by "
            f"python -m lightning_fabric.utilities.consolidate_checkpoint {path}"
        )
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of bytes that are no checkpoint the unpickler raises anything
        # Not in its words, which are a byte's number, or advise to let the file run what it likes.
        whole = "it holds objects that only code in it could make, and none of it is run"
        reason = whole if zipfile.is_zipfile(path) else "it is no file of torch's, or broken off"
        raise UserError(f"{path} is not a checkpoint that can be opened: {reason}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} holds no state_dict, so it is not a checkpoint of lightning_dalle")
    return checkpoint


def write_safetensors(path: Path, checkpoint: dict[str, Any]) -> None:
    """Writes the models of a checkpoint, and what is needed to open them, without the state of its training."""
    weights = {
        name: tensor.contiguous()
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith(("dvae.", "dalle.", "clip."))
    }
    kept = ("dvae_config", "dalle_config", "clip_config", "tokenizer", "attribution")
    record = {key: checkpoint[key] for key in kept if key in checkpoint}
    save_file(weights, path, {RECORD: json.dumps(record, ensure_ascii=False)})
    path.chmod(0o644)  # for others, but safetensors writes it for its owner alone


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            record = (file.metadata() or {}).get(RECORD)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file that can be opened: {error}") from error
    if record is None:
        raise UserError(f"the metadata of {path} have no entry {RECORD}, so lightning_dalle did not write it")
    return {"state_dict": weights, **json.loads(record)}


def weights_digest(*models: nn.Module) -> str:
    """Hash of all weights and buffers: the same model gives the same, whatever file it came from."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def _dvae(checkpoint: dict[str, Any], path: Path) -> DVAE:
    if "dvae_config" not in checkpoint:
        raise UserError(f"a dVAE checkpoint is needed, but {path} holds no dVAE")
    try:
        dvae = DVAE(DVAEConfig(**checkpoint["dvae_config"]))
    except TypeError as error:
        raise UserError(f"{path} was written by another version of lightning_dalle: {error}") from error
    _load_weights(dvae, checkpoint, "dvae.", path)
    return dvae.eval()


def _load_weights(model: nn.Module, checkpoint: dict[str, Any], prefix: str, path: Path) -> None:
    weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights in {path} do not fit the shape that it states: {error}") from error
