"""The commands beside Lightning's: `generate` and `reproduce`.

Knows files, prompts and the order of a recipe's stages. Imports torch only inside the functions, so that `--help` and
a user's mistake are answered at once.
"""

import hashlib
import itertools
import json
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_dalle.errors import UserError
from lightning_dalle.inference.options import SamplingOptions


def generate(
    checkpoint: Path,
    prompts: list[str] | None = None,
    prompt_file: Path | None = None,
    count: int = 4,
    seed: int = 0,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
    image: Path | None = None,
    rows: int | None = None,
    dvae: Path | None = None,
    out: Path = Path("samples"),
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Draw pictures of prompts; writes PNGs and a JSON beside each that says how it was made.

    Args:
        checkpoint: of a DALL-E; it carries its tokenizer and its dVAE.
        prompts: what to draw: '["a cat", "a dog"]', or one `--prompts+ "a cat"` after the other.
        prompt_file: a text file of prompts, one a line.
        count: pictures of each prompt.
        seed: of the first picture; the next have the seeds after it.
        sampling: how each code is drawn.
        image: a picture to complete: its upper rows are kept.
        rows: rows of codes that are kept of the picture; half of the grid if not given.
        dvae: another dVAE checkpoint to decode with.
        out: folder for the pictures; it must not hold any of the same name.
        batch_size: pictures made at once.
        device: cpu, cuda, ..., or auto for the GPU if there is one.
    """
    wanted = _prompts(prompts, prompt_file)
    if image is not None and not image.is_file():
        raise UserError(f"there is no image at {image}")
    if rows is not None and image is None:
        raise UserError(f"rows={rows} are to be kept, but no image is given")
    if out.is_file():
        raise UserError(f"the folder for the pictures is to be {out}, but that is a file")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but at least 1 picture must be made at once")
    if count < 1:
        raise UserError(f"count is {count}, but at least 1 picture must be made")
    if not checkpoint.is_file():
        raise UserError(f"there is no checkpoint at {checkpoint}")
    files = [out / f"{p:04d}_{_slug(prompt)}_{j:04d}.png" for p, prompt in enumerate(wanted) for j in range(count)]
    written = [*files, *(file.with_suffix(".json") for file in files), out / "samples.png"]
    taken = [file for file in written if file.exists()]
    if taken:
        raise UserError(f"{taken[0]} is there already; choose another --out than {out}")

    import torch

    from lightning_dalle.inference.pipeline import Request, TextToImage
    from lightning_dalle.pictures import captioned_grid, progress, save, to_pil

    pipeline = TextToImage.from_checkpoint(checkpoint, dvae)
    given = None
    if image is not None:
        kept = pipeline.dalle.config.grid // 2 if rows is None else rows
        given = pipeline.top_rows(_read_image(image, pipeline.dvae.config.image_size), kept)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    requests = [Request(prompt, seed + p * count + j) for p, prompt in enumerate(wanted) for j in range(count)]
    pipeline.tokens(wanted)  # an empty prompt is an error before a folder is made
    out.mkdir(parents=True, exist_ok=True)
    made = []
    with progress("Drawing") as on_progress:
        for file, request, picture in zip(
            files, requests, pipeline(requests, sampling, given, batch_size, on_progress), strict=True
        ):
            made.append(to_pil(picture))
            save(made[-1], file, pipeline.attribution)
            record = {
                "prompt": request.prompt,
                "seed": request.seed,
                "sampling": asdict(sampling),
                "checkpoint": str(checkpoint),
                "dvae": None if dvae is None else str(dvae),
                "image": None if image is None else str(image),
                "rows_kept": None if given is None else len(given) // pipeline.dalle.config.grid,
                "attribution": pipeline.attribution,
            }
            file.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    rows_of_sheet = [made[i : i + count] for i in range(0, len(made), count)]
    save(captioned_grid(rows_of_sheet, wanted), out / "samples.png", pipeline.attribution)
    print(f"{len(made)} pictures in {out}, all of them on {out / 'samples.png'}")


def _prompts(prompts: list[str] | None, prompt_file: Path | None) -> list[str]:
    """The prompts asked for, none of them empty."""
    if (prompts is None) == (prompt_file is None):
        raise UserError("give either --prompts or --prompt_file, and not both")
    if prompt_file is not None:
        if not prompt_file.is_file():
            raise UserError(f"there is no prompt file at {prompt_file}")
        try:
            lines = prompt_file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt file {prompt_file} is not UTF-8 text: {error}") from error
        prompts = [line for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"the prompt file {prompt_file} holds no prompt")
    assert prompts is not None
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise UserError(f"prompt {i + 1} of {len(prompts)} is empty")
    if not prompts:
        raise UserError("the list of prompts is empty")
    return prompts


def _slug(prompt: str) -> str:
    return "".join(char if char.isalnum() else "_" for char in prompt.lower())[:40]


def _read_image(path: Path, size: int) -> Any:
    from PIL import Image

    from lightning_dalle.data.datamodule import image_transform

    try:
        with Image.open(path) as picture:
            return image_transform(size)(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what PIL is known to raise
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def reproduce(
    run_dir: Path,
    stages: dict[str, list[str]],
    prompts: int = 200,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
) -> None:
    """Run a recipe's stages on OpenMoji through `fit`, then measure; goes on where an earlier run was interrupted.

    Args:
        run_dir: folder of the whole run: a folder for each stage, samples.png and report.json.
        stages: for dvae and dalle, in this order, the arguments of `fit`; {run_dir} in them stands for the folder.
        prompts: held-out compositions that are drawn and measured, one sample each.
        sampling: how the samples are drawn.
    """
    if list(stages) != ["dvae", "dalle"]:
        raise UserError(f"a recipe has the stages dvae and dalle, but this one has {', '.join(stages) or 'none'}")
    finished: dict[str, Any] = {}
    after: str | None = None
    for name, arguments in stages.items():
        fit = [argument.replace("{run_dir}", str(run_dir)) for argument in arguments]
        finished[name] = _run_stage(name, fit, run_dir, after)
        after = finished[name]["checkpoint"]
    report_file = run_dir / "report.json"
    recipe = {"stages": finished, "prompts": prompts, "sampling": asdict(sampling)}
    if report_file.exists() and json.loads(report_file.read_text())["recipe"] == recipe:
        print(f"report: finished already, see {report_file}")
        return

    from lightning_dalle import machine
    from lightning_dalle.checkpoints import load_dvae
    from lightning_dalle.evaluation import openmoji
    from lightning_dalle.inference.pipeline import TextToImage
    from lightning_dalle.pictures import progress, save

    begun = time.time()
    checkpoints = {name: run_dir / name / "checkpoints" / "last.ckpt" for name in stages}
    dvae = load_dvae(checkpoints["dvae"])
    emoji = openmoji.Emoji(dvae.config.image_size)
    reconstruction = openmoji.measure_dvae(dvae, emoji)
    with progress("Drawing held-out compositions") as on_progress:
        pipeline = TextToImage.from_checkpoint(checkpoints["dalle"])
        composition, asked, samples = openmoji.measure_dalle(pipeline, emoji, prompts, sampling, on_progress)
    save(openmoji.sheet(emoji, asked, samples), run_dir / "samples.png", pipeline.attribution)
    result = {
        "recipe": recipe,
        "reconstruction": reconstruction,
        "composition": composition,
        "commit": _commit(),
        "machine": machine.describe(),
        "seconds": round(time.time() - begun, 1),
        "attribution": pipeline.attribution,
    }
    _write_whole(report_file, json.dumps(result, indent=2) + "\n")
    print(json.dumps({"reconstruction": reconstruction, "composition": composition}, indent=2))
    print(f"finished: look at {run_dir / 'samples.png'}, {report_file} and tensorboard --logdir {run_dir}")


def _run_stage(name: str, fit: list[str], run_dir: Path, after: str | None) -> dict[str, Any]:
    """Fits one stage unless it is finished.

    Args:
        name: of the stage and of its folder.
        fit: arguments of `fit`.
        run_dir: folder of the run.
        after: hash of the checkpoint of the stage before, on which this one is built.

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
        if not last.exists() or _sha256(last) != record["checkpoint"]:
            raise UserError(
                f"{finished} tells of another checkpoint than {last}; delete {folder} to train the stage again"
            )
        print(f"{name}: finished already in {record['seconds']:.0f} s")
        return record
    resume = ["--ckpt_path", str(last)] if last.exists() else []
    print(f"{name}: {'going on from ' + str(last) if resume else 'training'}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(started, json.dumps(settings, indent=2) + "\n")

    from lightning_dalle.cli import lightning

    logger = "--trainer.logger.init_args."
    begun = time.time()
    lightning(["fit", *fit, f"{logger}save_dir", str(run_dir), f"{logger}version", name, *resume])
    record = {
        **settings,
        "checkpoint": _sha256(last),
        "seconds": round(time.time() - begun, 1),
        "resumed": bool(resume),
    }
    _write_whole(finished, json.dumps(record, indent=2) + "\n")
    return record


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _commit() -> str | None:
    """The commit of this code where it runs from a clone, marked if there are changes beside it."""
    if shutil.which("git") is None:
        return None
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or None


def _digests(fit: list[str]) -> dict[str, str]:
    """Hashes of the config files that a stage reads."""
    files = [Path(value) for option, value in itertools.pairwise(fit) if option == "--config"]
    for file in files:
        if not file.is_file():
            raise UserError(f"the recipe names the config {file}, but there is no such file")
    return {str(file): _sha256(file) for file in files}


def _write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.rename(path)
