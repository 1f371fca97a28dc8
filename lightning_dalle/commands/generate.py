"""`generate`: sample images of prompts from a trained model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_dalle.errors import UserError
from lightning_dalle.files import make_folder, write_json
from lightning_dalle.inference.config import GenerationConfig, check_candidates, list_prompts

GRID_COLUMNS, MAX_GRID_ROWS = 8, 64
"""Size of the overview grid; it is held in memory, so it shows only the first rows of a long prompt file."""


def generate(
    checkpoint: Path,
    prompts: list[str] | str | None = None,
    prompt_file: Path | None = None,
    num_candidates: int = 4,
    clip: str | None = None,
    image: Path | None = None,
    rows: int | None = None,
    paste: bool = False,
    dvae: Path | None = None,
    out: Path = Path("samples"),
    device: str = "auto",
    **options: Any,
) -> None:
    """Write generated images of prompts as PNG, each with a JSON file of its settings, and a grid of all images.

    Args:
        checkpoint: checkpoint of a DALL-E (with its tokenizer and dVAE), or folder of a run or an export.
        prompts: descriptions of the images: "a cat", or '["a cat", "a dog"]', or `--prompts+ "a cat"` several times.
        prompt_file: text file of prompts, one per line.
        num_candidates: number of images sampled for each prompt (512 in the paper).
        clip: CLIP that ranks the candidates: a checkpoint, folder of a run or an export, or open_clip's MODEL:WEIGHTS,
            such as ViT-B-32:openai. The default is the CLIP in the folder `checkpoint`.
        image: image to complete; its upper rows are kept.
        rows: number of rows of the image's codes to keep; by default 15 of 32, as in the paper's Fig. 14.
        paste: whether the kept rows show the image's own pixels, not their reconstruction by the dVAE.
        dvae: checkpoint or folder with a dVAE to decode with, in place of the one in the DALL-E's checkpoint.
        out: folder for the images; no file of the same name may exist in it. The grid is OUT.png.
        device: cpu, cuda, ..., or auto for a GPU if there is one.
        **options: other fields of GenerationConfig.
    """
    config = GenerationConfig(num_candidates=num_candidates, **options)
    texts = _read_prompts(prompts, prompt_file)
    slugs = ["".join(char if char.isalnum() else "_" for char in text.lower())[:40] for text in texts]
    if image is not None and not image.is_file():
        raise UserError(f"there is no image at {image}: correct --image")
    if (rows is not None or paste) and image is None:
        raise UserError(f"{'--paste' if rows is None else f'--rows {rows}'} needs an image to complete: give --image")
    if out.is_file():
        raise UserError(f"the output folder {out} is a file: choose another --out")
    ranks = range(config.num_kept)
    files = [[out / f"{i:04d}_{slug}_{rank:04d}.png" for rank in ranks] for i, slug in enumerate(slugs)]
    pngs = [file for files_of_prompt in files for file in files_of_prompt]
    overview = out.parent / f"{out.name}.png"  # outside the folder, so that `evaluate` can read the folder
    for file in [*pngs, *(png.with_suffix(".json") for png in pngs), overview]:
        if file.exists():
            raise UserError(f"{file} already exists: choose another --out than {out}")

    from lightning_dalle.data.images.decoding import UnreadableImage, decode_pil
    from lightning_dalle.hardware import resolve_device
    from lightning_dalle.images import captioned_grid, save_png
    from lightning_dalle.inference.pipeline import TextToImage
    from lightning_dalle.inference.scorers import fingerprint, load_scorer
    from lightning_dalle.progress import progress_bar

    pipeline = TextToImage.from_pretrained(checkpoint, dvae)
    if clip is not None:
        pipeline.scorer = load_scorer(clip)
    check_candidates(num_candidates, config.num_kept, pipeline.scorer is not None)
    image_prompt = rows_kept = None
    if image is not None:
        try:
            image_prompt = pipeline.image_prompt(decode_pil({"bytes": None, "path": str(image)}), rows, paste)
        except UnreadableImage as error:
            raise UserError(f"cannot read {image} as an image ({error}): give another --image") from error
        rows_kept = len(image_prompt.codes) // pipeline.dalle.config.grid
    pipeline.to(resolve_device(device))
    make_folder(out)
    grid: list[list[Any]] = []
    titles: list[str] = []
    with progress_bar("Sampling") as on_progress:
        generated = pipeline.generate(texts, config, image_prompt, on_progress)
        for prompt, files_of_prompt, images in zip(texts, files, generated, strict=True):
            for file, made in zip(files_of_prompt, images, strict=True):
                save_png(made.image, file, pipeline.attribution)
                record = {
                    "prompt": prompt,
                    "seed": made.seed,
                    "score": made.score,
                    "candidates": num_candidates,
                    "ranked_by": fingerprint(pipeline.scorer),
                    "sampling": asdict(config.sampling),
                    "checkpoint": checkpoint,
                    "dvae": dvae,
                    "image": image,
                    "rows_kept": rows_kept,
                    "pixels_pasted": paste,
                    "attribution": pipeline.attribution,
                }
                write_json(file.with_suffix(".json"), record)
            if len(grid) < MAX_GRID_ROWS:
                pils = [made.image for made in images]
                grid += [pils[i : i + GRID_COLUMNS] for i in range(0, len(pils), GRID_COLUMNS)]
                titles += [prompt, *[""] * (len(grid) - len(titles) - 1)]
    save_png(captioned_grid(grid, titles), overview, pipeline.attribution)
    shown = "them" if len(grid) < MAX_GRID_ROWS else "the first"
    print(f"wrote {len(pngs)} images to {out}/; {overview} shows {shown}")


def _read_prompts(prompts: list[str] | str | None, prompt_file: Path | None) -> list[str]:
    if (prompts is None) == (prompt_file is None):
        raise UserError("give either --prompts or --prompt_file, and not both")
    texts = [prompts] if isinstance(prompts, str) else list(prompts or [])
    if prompt_file is not None:
        try:
            texts = [line for line in prompt_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read the prompt file {prompt_file} as UTF-8 text ({error}): correct --prompt_file"
            ) from error
    if not texts:
        raise UserError(f"there is no prompt in {prompt_file or '--prompts'}: give at least one")
    return list_prompts(texts)
