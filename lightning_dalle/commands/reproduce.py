"""`reproduce`: a recipe's stages of training in order, then its report.

Knows stages, their files, and what of a run is finished.
"""

import itertools
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_dalle.errors import UserError
from lightning_dalle.files import sha256, write_json
from lightning_dalle.inference.config import Reranking, SamplingOptions
from lightning_dalle.provenance import commit


def reproduce(
    run_dir: Path,
    stages: dict[str, list[str]],
    prompts: int = 200,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
    reranking: Reranking | None = None,
) -> None:
    """Run a recipe's stages on OpenMoji through `fit`, then measure; goes on where an earlier run was interrupted.

    Args:
        run_dir: folder of the whole run: a folder for each stage, samples.png and report.json.
        stages: for dvae, dalle and, to rerank, clip, in this order, the arguments of `fit`; {run_dir} in them stands
            for the folder.
        prompts: held-out compositions that are drawn and measured, one sample each.
        sampling: how the samples are drawn.
        reranking: how the best of many candidates is measured; needs a stage clip.
    """
    if list(stages) not in (["dvae", "dalle"], ["dvae", "dalle", "clip"]):
        raise UserError(
            f"a recipe has the stages dvae, dalle and perhaps clip, but this one has {', '.join(stages) or 'none'}"
        )
    if reranking is not None and "clip" not in stages:
        raise UserError("candidates are to be reranked, but the recipe has no stage clip")
    if prompts < 1:
        raise UserError(f"prompts is {prompts}, but at least 1 composition must be drawn")
    fits = {name: [word.replace("{run_dir}", str(run_dir)) for word in words] for name, words in stages.items()}
    for fit in fits.values():
        _digests(fit)  # a config that is not there is told before the first stage is trained
    finished: dict[str, Any] = {}
    for name, fit in fits.items():
        after = None if name == "dvae" else finished["dvae"]["checkpoint"]
        finished[name] = run_stage(name, fit, run_dir, after)
    report_file = run_dir / "report.json"
    recipe = {
        "stages": finished,
        "prompts": prompts,
        "sampling": asdict(sampling),
        "reranking": None if reranking is None else json.loads(json.dumps(asdict(reranking))),
    }
    if report_file.exists() and json.loads(report_file.read_text())["recipe"] == recipe:
        print(f"report: finished already, see {report_file}")
        return

    from lightning_dalle.checkpoints import load_dvae
    from lightning_dalle.evaluation import openmoji
    from lightning_dalle.hardware import describe_hardware, resolve_device
    from lightning_dalle.images import save
    from lightning_dalle.inference.pipeline import TextToImage
    from lightning_dalle.inference.scorers import TrainedCLIP
    from lightning_dalle.progress import progress_bar

    begun = time.time()
    checkpoints = {name: run_dir / name / "checkpoints" / "last.ckpt" for name in stages}
    device = resolve_device("auto")
    dvae = load_dvae(checkpoints["dvae"]).to(device)
    emoji = openmoji.Emoji(dvae.config.image_size)
    reconstruction = openmoji.measure_dvae(dvae, emoji)
    with progress_bar("Drawing held-out compositions") as on_progress:
        pipeline = TextToImage.from_pretrained(checkpoints["dalle"]).to(device)
        composition, asked, samples = openmoji.measure_dalle(pipeline, emoji, prompts, sampling, on_progress)
    save(openmoji.sheet(emoji, asked, samples), run_dir / "samples.png", pipeline.attribution)
    (run_dir / "samples").mkdir(exist_ok=True)
    for n, (i, sample) in enumerate(zip(asked, samples, strict=True)):
        texts = {"caption": emoji.captions[i], "seed": str(n)}
        save(sample, run_dir / "samples" / f"{n:06d}.png", pipeline.attribution, texts)
    clip = None
    if "clip" in stages:
        pipeline.scorer = TrainedCLIP(checkpoints["clip"]).to(device)
        clip = openmoji.measure_clip(pipeline.scorer.clip, emoji)
    if reranking is not None:
        with progress_bar("Drawing candidates") as on_progress:
            composition["reranked"] = openmoji.measure_reranking(pipeline, emoji, reranking, on_progress)
    before_fidelity = time.time()
    with progress_bar("Reading pictures for FID") as on_progress:
        composition["fidelity"] = openmoji.measure_fidelity(samples, emoji, asked, on_progress)
    result = {
        "kind": "recipe",
        "recipe": recipe,
        "reconstruction": reconstruction,
        "composition": composition,
        "clip": clip,
        "commit": commit(),
        "machine": describe_hardware(),
        "seconds": round(before_fidelity - begun, 1),
        "seconds_of_fidelity": round(time.time() - before_fidelity, 1),
        "attribution": pipeline.attribution,
    }
    write_json(report_file, result)
    print(json.dumps({"reconstruction": reconstruction, "composition": composition, "clip": clip}, indent=2))
    print(f"finished: look at {run_dir / 'samples.png'}, {report_file} and tensorboard --logdir {run_dir}")


def run_stage(name: str, fit: list[str], run_dir: Path, after: str | None) -> dict[str, Any]:
    """Fits one stage unless it is finished.

    Args:
        name: of the stage and of its folder.
        fit: arguments of `fit`.
        run_dir: folder of the run.
        after: hash of the checkpoint of the dVAE, on which this one is built.

    Returns:
        what finished.json holds: the settings, the hash of the checkpoint, and the seconds spent on it.
    """
    folder = run_dir / name
    started, finished, last = folder / "started.json", folder / "finished.json", folder / "checkpoints" / "last.ckpt"
    settings = {"fit": fit, "configs": _digests(fit), "after": after}
    if started.exists():
        earlier = json.loads(started.read_text())
        if earlier != settings:
            changed = ", ".join(key for key in settings if earlier.get(key) != settings[key])
            raise UserError(
                f"the stage {name} in {run_dir} was begun with other settings than the recipe has now ({changed}); "
                f"choose another --run_dir, or delete {folder} to train it again"
            )
    if finished.exists():
        record: dict[str, Any] = json.loads(finished.read_text())
        if not last.exists() or sha256(last) != record["checkpoint"]:
            raise UserError(
                f"{finished} tells of another checkpoint than {last}; delete {folder} to train the stage again"
            )
        print(f"{name}: finished already in {record['seconds']:.0f} s")
        return record
    if last.exists() and not started.exists():
        raise UserError(
            f"{last} was made by something else than this recipe; choose another --run_dir, or delete {folder}"
        )
    resume = ["--ckpt_path", str(last)] if last.exists() else []
    print(f"{name}: {'going on from ' + str(last) if resume else 'training'}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(started, settings)

    from lightning_dalle.lightning_cli import lightning

    logger = "--trainer.logger.init_args."
    begun = time.time()
    lightning(["fit", *fit, f"{logger}save_dir", str(run_dir), f"{logger}version", name, *resume])
    record = {
        **settings,
        "checkpoint": sha256(last),
        "seconds": round(time.time() - begun, 1),
        "resumed": bool(resume),
    }
    write_json(finished, record)
    return record


def _digests(fit: list[str]) -> dict[str, str]:
    """Hashes of the config files that a stage reads."""
    files = [Path(value) for option, value in itertools.pairwise(fit) if option == "--config"]
    for file in files:
        if not file.is_file():
            raise UserError(f"the recipe names the config {file}, but there is no such file")
    return {str(file): sha256(file) for file in files}
