"""`reproduce`: trains the dVAE, DALL-E and CLIP of a recipe in order, measures them and writes a report."""

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.protocol import Protocol, RerankingProtocol
from lightning_dalle.files import sha256, write_json
from lightning_dalle.provenance import commit
from lightning_dalle.results_table import FORMAT


def reproduce(
    run_dir: Path, stages: dict[str, list[str]], protocol: Protocol, reranking: RerankingProtocol | None = None
) -> None:
    """Train the stages of a recipe on OpenMoji with `fit`, then measure them; a run that was interrupted resumes.

    Args:
        run_dir: folder of the run: a folder for each stage, samples/, samples.png and report.json.
        stages: arguments of `fit` for dvae, dalle and, for reranking, clip, in this order; {run_dir} in them is
            replaced by the folder.
        protocol: captions, sampling and measures of the report; a YAML file of configs/protocols or its keys.
        reranking: settings of reranking in the report; requires a stage clip.
    """
    if list(stages) not in (["dvae", "dalle"], ["dvae", "dalle", "clip"]):
        raise UserError(
            f"the recipe has the stages {', '.join(stages) or 'none'}, but must have dvae, dalle and optionally clip, "
            "in this order: change the key stages"
        )
    if reranking is not None and "clip" not in stages:
        raise UserError("the recipe has `reranking`, but no stage clip: add the stage, or remove `reranking`")
    generation = protocol.generation
    if generation.split != "compositions" or generation.candidates != (1,) or generation.captions.csv is not None:
        raise UserError(
            f"the protocol {protocol.name} cannot be used by `reproduce`: its generation needs split: compositions (is "
            f"{generation.split}), candidates: [1] (is {list(generation.candidates)}) and no captions.csv (is "
            f"{generation.captions.csv or 'none'}); change these keys"
        )
    fits = {name: [word.replace("{run_dir}", str(run_dir)) for word in words] for name, words in stages.items()}
    for fit in fits.values():
        _config_hashes(fit)  # reports a missing config before the first stage is trained
    finished: dict[str, Any] = {}
    for name, fit in fits.items():
        dvae_sha256 = None if name == "dvae" else finished["dvae"]["checkpoint"]
        finished[name] = run_stage(name, fit, run_dir, dvae_sha256)
    report_file = run_dir / "report.json"
    settings = {"protocol": asdict(protocol), "reranking": None if reranking is None else asdict(reranking)}
    recipe = {"stages": finished, **json.loads(json.dumps(settings, default=str))}
    if report_file.exists() and json.loads(report_file.read_text())["recipe"] == recipe:
        print(f"report: already finished, see {report_file}")
        return
    result = _measure(run_dir, protocol, reranking, has_clip="clip" in stages)
    write_json(report_file, {"format": FORMAT, "kind": "recipe", "recipe": recipe, **result})
    print(json.dumps({name: result[name] for name in ("reconstruction", "composition", "clip")}, indent=2, default=str))
    print(f"finished: look at {run_dir / 'samples.png'}, {report_file} and tensorboard --logdir {run_dir}")


def _measure(run_dir: Path, protocol: Protocol, reranking: RerankingProtocol | None, has_clip: bool) -> dict[str, Any]:
    from lightning_dalle.checkpoints import load_dvae
    from lightning_dalle.evaluation import openmoji
    from lightning_dalle.hardware import describe_hardware, resolve_device
    from lightning_dalle.images import save_png
    from lightning_dalle.inference.pipeline import TextToImage
    from lightning_dalle.inference.scorers import CLIPScorer

    begun = time.time()
    checkpoint = "{}/checkpoints/last.ckpt"
    device = resolve_device("auto")
    dvae = load_dvae(run_dir / checkpoint.format("dvae")).to(device)
    emoji = openmoji.Emoji(dvae.config.image_size)
    reconstruction = openmoji.measure_dvae(dvae, emoji)
    samples_dir = run_dir / "samples"
    for stale in samples_dir.glob("*.png"):  # left by an interrupted report, perhaps from other weights
        stale.unlink()
    pipeline = TextToImage.from_pretrained(run_dir / checkpoint.format("dalle")).to(device)
    composition, prompted, samples = openmoji.measure_dalle(pipeline, emoji, protocol, samples_dir)
    save_png(openmoji.image_grid(emoji, prompted, samples), run_dir / "samples.png", pipeline.attribution)
    clip = None
    if has_clip:
        pipeline.scorer = CLIPScorer.from_checkpoint(run_dir / checkpoint.format("clip")).to(device)
        clip = openmoji.measure_clip(pipeline.scorer.clip, emoji)
    if reranking is not None:
        composition["reranked"] = openmoji.measure_reranking(pipeline, emoji, reranking)
    before_fidelity = time.time()
    composition["fidelity"] = openmoji.measure_fidelity(samples_dir, emoji, protocol, device)
    return {
        "reconstruction": reconstruction,
        "composition": composition,
        "clip": clip,
        "commit": commit(),
        "machine": describe_hardware(),
        "seconds": round(before_fidelity - begun, 1),
        "seconds_of_fidelity": round(time.time() - before_fidelity, 1),
        "attribution": pipeline.attribution,
    }


def run_stage(name: str, fit: list[str], run_dir: Path, after: str | None) -> dict[str, Any]:
    """Train one stage unless it is finished, and return its settings, checkpoint hash and duration.

    Args:
        name: name of the stage and of its folder.
        fit: arguments of the subcommand `fit`.
        run_dir: folder of the run.
        after: SHA-256 of the dVAE checkpoint that this stage uses; None for the stage dvae.
    """
    folder = run_dir / name
    started, finished, last = folder / "started.json", folder / "finished.json", folder / "checkpoints" / "last.ckpt"
    settings = {"fit": fit, "configs": _config_hashes(fit), "after": after}
    if started.exists():
        earlier = json.loads(started.read_text())
        if earlier != settings:
            words = {"fit": "its arguments of fit", "configs": "its config files", "after": "its dVAE"}
            changed = ", ".join(words[key] for key in settings if earlier.get(key) != settings[key])
            raise UserError(
                f"cannot resume the stage {name} in {run_dir}: it was started with other settings than the recipe has "
                f"now (different: {changed}); choose another --run_dir, or delete {folder} to train it again"
            )
    if finished.exists():
        record: dict[str, Any] = json.loads(finished.read_text())
        if not last.exists() or sha256(last) != record["checkpoint"]:
            raise UserError(
                f"{last} is missing or is not the checkpoint that {finished} records; delete {folder} to train the "
                "stage again"
            )
        print(f"{name}: already finished in {record['seconds']:.0f} s")
        return record
    if last.exists() and not started.exists():
        raise UserError(f"{last} was not made by this recipe; choose another --run_dir, or delete {folder}")
    resume = ["--ckpt_path", str(last)] if last.exists() else []
    print(f"{name}: {'resuming from ' + str(last) if resume else 'training'}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(started, settings)

    from lightning_dalle.lightning_cli import run_lightning

    logger = "--trainer.logger.init_args."
    begun = time.time()
    run_lightning(["fit", *fit, f"{logger}save_dir", str(run_dir), f"{logger}version", name, *resume])
    record = {**settings, "checkpoint": sha256(last), "seconds": round(time.time() - begun, 1), "resumed": bool(resume)}
    write_json(finished, record)
    return record


def _config_hashes(fit: list[str]) -> dict[str, str]:
    files = [Path(value) for option, value in itertools.pairwise(fit) if option == "--config"]
    for file in files:
        if not file.is_file():
            raise UserError(f"the recipe names the config {file}, but there is no such file: correct the path")
    return {str(file): sha256(file) for file in files}
