"""`generate`: pictures of prompts, from a trained model.

Knows prompts and files.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_dalle.errors import UserError
from lightning_dalle.inference.config import SamplingOptions

MOST_ROWS = 64
"""Of eight pictures each, on the sheet: a file of thousands of prompts would not fit into memory."""


def generate(
    checkpoint: Path,
    prompts: list[str] | str | None = None,
    prompt_file: Path | None = None,
    num_candidates: int = 4,
    top: int | None = None,
    clip: str | None = None,
    seed: int = 0,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
    image: Path | None = None,
    rows: int | None = None,
    paste: bool = False,
    dvae: Path | None = None,
    out: Path = Path("samples"),
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """Draw pictures of prompts; writes PNGs and a JSON beside each that says how it was made.

    Args:
        checkpoint: of a DALL-E, which carries its tokenizer and its dVAE, or the folder of a recipe's run.
        prompts: what to draw: "a cat", or '["a cat", "a dog"]', or one `--prompts+ "a cat"` after the other.
        prompt_file: a text file of prompts, one a line.
        num_candidates: pictures that are made of each prompt (512 in the paper).
        top: pictures that are kept of them, the best by CLIP; all of them if not given.
        clip: ranks the candidates: a checkpoint of a CLIP trained here, or open_clip's model and weights, such as
            ViT-B-32:openai. The folder of a recipe's run brings its own.
        seed: of the first candidate; the next have the seeds after it.
        sampling: how each code is drawn.
        image: a picture to complete: its upper rows are kept.
        rows: rows of codes that are kept of the picture; 15 of 32 of the grid's if not given, as in Fig. 14.
        paste: put the picture's own pixels back in place of the dVAE's reconstruction of what is kept.
        dvae: another dVAE checkpoint to decode with.
        out: folder for the pictures; it must not hold any of the same name. The first of them on one sheet are beside
            it.
        batch_size: pictures made at once.
        device: cpu, cuda, ..., or auto for the GPU if there is one.
    """
    wanted = _prompts(prompts, prompt_file)
    if image is not None and not image.is_file():
        raise UserError(f"there is no image at {image}")
    if (rows is not None or paste) and image is None:
        what = "the pixels are to be pasted back" if rows is None else f"rows={rows} are to be kept"
        raise UserError(f"{what}, but no image is given")
    if out.is_file():
        raise UserError(f"the folder for the pictures is to be {out}, but that is a file")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but at least 1 picture must be made at once")
    if num_candidates < 1:
        raise UserError(f"num_candidates is {num_candidates}, but at least 1 picture of a prompt must be made")
    kept = num_candidates if top is None else top
    if not checkpoint.exists():
        raise UserError(f"there is no checkpoint at {checkpoint}")
    files = [
        [out / f"{p:04d}_{_slug(prompt)}_{rank:04d}.png" for rank in range(kept)] for p, prompt in enumerate(wanted)
    ]
    of_all = [file for some in files for file in some]
    overview = out.parent / f"{out.name}.png"  # not among the pictures, which may be evaluated as they are
    written = [*of_all, *(file.with_suffix(".json") for file in of_all), overview]
    taken = [file for file in written if file.exists()]
    if taken:
        raise UserError(f"{taken[0]} is there already; choose another --out than {out}")

    from lightning_dalle.hardware import resolve_device
    from lightning_dalle.images import captioned_grid, save
    from lightning_dalle.inference.pipeline import TextToImage, check_candidates
    from lightning_dalle.inference.scorers import identity, open_clip_scorer
    from lightning_dalle.progress import progress_bar

    pipeline = TextToImage.from_pretrained(checkpoint, dvae)
    if clip is not None:
        pipeline.scorer = open_clip_scorer(clip)
    check_candidates(num_candidates, kept, pipeline.scorer)
    given = None if image is None else pipeline.given(_open(image), rows)
    pipeline.to(resolve_device(device))
    pipeline.tokens(wanted)  # an empty prompt is an error before a folder is made
    out.mkdir(parents=True, exist_ok=True)
    sheet: list[list[Any]] = []
    titles: list[str] = []
    with progress_bar("Drawing") as on_progress:
        made = pipeline.pictures(wanted, num_candidates, kept, seed, sampling, given, paste, batch_size, on_progress)
        for prompt, some, pictures in zip(wanted, files, made, strict=True):
            for file, picture in zip(some, pictures, strict=True):
                save(picture.image, file, pipeline.attribution)
                record = {
                    "prompt": prompt,
                    "seed": picture.seed,
                    "score": picture.score,
                    "candidates": num_candidates,
                    "ranked_by": identity(pipeline.scorer),
                    "sampling": asdict(sampling),
                    "checkpoint": str(checkpoint),
                    "dvae": None if dvae is None else str(dvae),
                    "image": None if image is None else str(image),
                    "rows_kept": None if given is None else len(given.codes) // pipeline.dalle.config.grid,
                    "pixels_pasted": paste,
                    "attribution": pipeline.attribution,
                }
                file.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
            if len(sheet) < MOST_ROWS:
                sheet += [[picture.image for picture in pictures[i : i + 8]] for i in range(0, kept, 8)]
                titles += [prompt, *[""] * (len(sheet) - len(titles) - 1)]
    save(captioned_grid(sheet, titles), overview, pipeline.attribution)
    print(f"{len(of_all)} pictures in {out}; {overview} shows {'them' if len(sheet) < MOST_ROWS else 'the first'}")


def _prompts(prompts: list[str] | str | None, prompt_file: Path | None) -> list[str]:
    """The prompts asked for, none of them empty."""
    if isinstance(prompts, str):
        prompts = [prompts]
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


def _open(path: Path) -> Any:
    from lightning_dalle.data.images.decoding import Unreadable, read_picture

    try:
        return read_picture({"bytes": None, "path": str(path)})
    except Unreadable as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error
