"""Configs of the repo, shrunk for tests, and a scorer without weights."""

from pathlib import Path
from typing import Any

import torch
import yaml


class Redness:
    """Scorer that prefers red images."""

    def score(self, images: torch.Tensor, caption: str) -> torch.Tensor:
        return images[:, 0].mean((1, 2))


SMALL = {
    "LitDVAE": {"codebook_size": 16, "n_group": 3, "n_block": 1, "n_hid": 8, "n_init": 8},
    "LitDALLE": {"n_layer": 2, "n_head": 2, "n_embd": 16},
    "LitCLIP": {"vision_width": 64, "vision_layers": 1, "text_width": 64, "text_layers": 1, "embed_dim": 16},
}


def shrunk(path: Path, folder: Path, data: Path, weights: Path, **protocol: Any) -> Path:
    """Write a config of the repo with smaller numbers and other paths, and return its file.

    Args:
        path: config of the repo.
        folder: folder of the run and of the new config.
        data: path of the data.
        weights: Inception weights.
        **protocol: keys of the evaluation's protocol to replace.
    """
    config = yaml.safe_load(path.read_text())
    trainer, model = config["trainer"], config["model"]
    trainer |= {"accelerator": "cpu", "enable_progress_bar": False}
    trainer["logger"]["init_args"]["save_dir"] = str(folder)
    for callback in trainer["callbacks"]:
        arguments = callback.get("init_args", {})
        if callback["class_path"].endswith("Evaluation"):
            if isinstance(arguments["protocol"], str):
                arguments["protocol"] = yaml.safe_load((path.parent / arguments["protocol"]).read_text())
            arguments["protocol"] |= protocol
            arguments |= {"inception": str(weights), "samples_dir": str(folder / "samples")}
            arguments |= {"results_dir": str(folder / "results"), "cache_dir": str(folder.parent / "features")}
            if "every_n_validations" in arguments:
                arguments["every_n_validations"] = 2
        if "every_n_train_steps" in arguments:
            arguments["every_n_train_steps"] = 4
    config["data"]["source"]["init_args"]["path"] = str(data)
    config["data"] |= {"batch_size": 4, "num_workers": 0}
    if "max_steps" in trainer:
        trainer |= {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1, "log_every_n_steps": 1}
        model["init_args"]["config"] = SMALL[model["class_path"].rsplit(".", 1)[-1]]
        for reader in (model["init_args"], model["init_args"].get("reconstruction_augment", {})):
            if "dvae_checkpoint" in reader:
                reader["dvae_checkpoint"] = str(folder / "dvae" / "checkpoints" / "last.ckpt")
        for schedule in ("learning_rate", "temperature", "kl_weight"):
            if schedule in model["init_args"]:
                model["init_args"][schedule] |= {"warmup_steps": 0}
        config["data"] |= {"image_size": 32, "text_len": 16, "vocab_size": 300}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / path.name
    file.write_text(yaml.safe_dump(config))
    return file


def add_scorer(config: Path, **arguments: Any) -> None:
    """Add a scorer without weights and other arguments to the evaluation of a config."""
    settings = yaml.safe_load(config.read_text())
    arguments["scorer"] = {"class_path": "shrunk.Redness"}
    settings["trainer"]["callbacks"][0]["init_args"] |= arguments
    config.write_text(yaml.safe_dump(settings))


def source_config(data: Path, **splits: str) -> dict[str, Any]:
    """Return the config keys of a source."""
    kind = "lightning_dalle.data.sources.captioned.CaptionedImages"
    return {"class_path": kind, "init_args": {"path": str(data), "splits": splits}}
