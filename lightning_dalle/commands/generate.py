"""`generate`: pictures of prompts, from a trained model.

Knows prompts and files.
"""

import json
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
