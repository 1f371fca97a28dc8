"""`export`: a trained model as a folder for others, with a card that says what it is.

Knows files, and what stands in results.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lightning_dalle.errors import UserError
from lightning_dalle.files import atomic_write, make_folder, read_yaml, sha256
from lightning_dalle.provenance import commit
from lightning_dalle.results_table import cautions, markdown, rows

CARD = """---
library_name: lightning_dalle
pipeline_tag: text-to-image
---
# {name}

A DALL-E (Ramesh et al. 2021) of {dalle_size} parameters with a discrete VAE of {dvae_size}: a caption of at most
{text_len} tokens becomes a grid of {grid}x{grid} codes out of {codebook_size}, and that a picture of {image_size}
pixels.
Written by lightning_dalle, commit {commit}.

```python
from lightning_dalle import TextToImage

draw = TextToImage.from_pretrained("{name}")
draw("a caption", seed=0)[0].image.save("picture.png")
```

| file | what it holds |
|---|---|
{files}

## Data

{data}

## Numbers

{numbers}

## Made of

{made_of}
"""

FILES = {
    "dalle.safetensors": "the transformer, the dVAE, the tokenizer and their shapes: all that draws pictures",
    "clip.safetensors": "the CLIP that ranks candidates",
    "tokenizer.json": "the tokenizer once more, for Hugging Face's `tokenizers`: without the padding",
    "config.json": "the shapes once more, to be read",
}


def export(checkpoint: Path, out: Path, clip: Path | None = None, results: list[Path] | None = None) -> None:
    """Write a DALL-E, its dVAE, its tokenizer and a CLIP as safetensors with a model card: what `generate` and
    `TextToImage.from_pretrained` open.

    Args:
        checkpoint: of a DALL-E, or the folder of a recipe's run.
        out: the folder to write; it must not be there yet.
        clip: checkpoint of a CLIP that was trained here, to rank candidates; a recipe's run brings its own.
        results: JSON files that `test`, `evaluate` or `reproduce` wrote of this model, for the card; of a recipe's run
            its report, if none are given.
    """
    if out.exists():
        raise UserError(f"{out} is there already; choose another --out")
    if not checkpoint.exists():
        raise UserError(f"there is no checkpoint at {checkpoint}")
    if results is None:
        results = [file for file in [checkpoint / "report.json"] if file.is_file()]
    measured: dict[str, dict[str, Any]] = {}
    for file in results:
        if file.stem in measured:
            raise UserError(
                f"two --results are called {file.stem}, {file} the second, but the card tells them apart by their names"
            )
        measured[file.stem] = _result(file)

    from lightning_dalle.checkpoints import load_clip, load_dalle, read_checkpoint, write_safetensors
    from lightning_dalle.inference.pipeline import files_of

    source, clip_of_run = files_of(checkpoint)
    clip = clip or clip_of_run
    sources = {"dalle": source} if clip is None else {"dalle": source, "clip": clip}
    loaded, content = load_dalle(source), read_checkpoint(source)
    if "clip" in sources:
        load_clip(sources["clip"])
    dalle, dvae = loaded.dalle.config, loaded.dvae.config
    written = [*(f"{name}.safetensors" for name in sources), "tokenizer.json", "config.json"]
    # all that can be refused is refused by here and in the card, before anything is written
    card = CARD.format(
        name=out.name,
        dalle_size=_size(loaded.dalle),
        dvae_size=_size(loaded.dvae),
        text_len=dalle.text_len,
        grid=dalle.grid,
        codebook_size=dalle.codebook_size,
        image_size=dvae.image_size,
        commit=commit() or "unknown, since it did not run from a clone",
        files="\n".join(f"| `{name}` | {what} |" for name, what in FILES.items() if name in written),
        data="\n\n".join(_data(source, loaded.attribution)),
        numbers="\n\n".join(_numbers(measured)),
        made_of="\n".join(f"- `{name}`: a checkpoint of sha256 {sha256(file)}" for name, file in sources.items()),
    )
    make_folder(out.parent)
    with atomic_write(out) as partial:  # a release that stops half written must not stand in the way of the next try
        make_folder(partial)
        for name, file in sources.items():
            write_safetensors(partial / f"{name}.safetensors", read_checkpoint(file))
        loaded.tokenizer.bpe.save(str(partial / "tokenizer.json"))
        shapes = {"dalle": content["dalle_config"], "dvae": content["dvae_config"]}
        (partial / "config.json").write_text(json.dumps(shapes, indent=2) + "\n")
        (partial / "README.md").write_text(card)
    print(f"{out} holds {', '.join(sorted(file.name for file in out.iterdir()))}")


def _result(file: Path) -> dict[str, Any]:
    """A result that the table can show."""
    if not file.is_file():
        raise UserError(f"there is no result at {file}")
    try:
        result: dict[str, Any] = json.loads(file.read_text())
        _ = list(rows(result)), cautions(result), result["commit"]  # what the card shows
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is no result of lightning_dalle: {error!r}") from error
    return result


def _size(model: Any) -> str:
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{millions / 1e3:.2f} billion" if millions >= 1e3 else f"{millions:.1f} million"


def _data(checkpoint: Path, attribution: str | None) -> Iterator[str]:
    """What the model was trained on, as its run says: Lightning leaves the config beside the checkpoints."""
    config = checkpoint.parent.parent / "config.yaml"
    settings = read_yaml(config) if config.is_file() else {}
    if "data" in settings:
        yield f"```yaml\n{yaml.safe_dump(settings['data'], sort_keys=False)}```"
    else:  # another's file may lie there, too
        yield "No config that names its data was beside the checkpoint, so what data it is of is not known here."
    if attribution is not None:
        yield f"What the licence of the pictures asks to be said of all that is made from them: {attribution}"


def _numbers(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table of the results, what is to be known of it, and their protocols."""
    if not measured:
        yield "Nothing has been measured of it."
        return
    lines = [(name, *row) for name, result in measured.items() for row in rows(result)]
    told = [f"{name}: {caution}" for name, result in measured.items() for caution in cautions(result)]
    yield markdown(lines, told)
    for name, result in measured.items():
        protocols = yaml.safe_dump(dict(_protocols(result)), sort_keys=False)
        yield f"Protocol of {name}, measured by commit {result['commit']}:\n\n```yaml\n{protocols}```"


def _protocols(result: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Every protocol in a result, by where it stands."""
    for key, value in result.items():
        if key == "protocol":
            yield where or key, value
        elif isinstance(value, dict):
            yield from _protocols(value, f"{where}.{key}".lstrip("."))
