"""`export`: write a trained model as a folder to share, with a model card."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from lightning_dalle.errors import UserError
from lightning_dalle.files import atomic_write, make_folder, read_yaml, sha256
from lightning_dalle.provenance import commit
from lightning_dalle.results_table import markdown_table, read_result

CARD = """---
library_name: lightning_dalle
pipeline_tag: text-to-image
---
# {name}

A DALL-E (Ramesh et al. 2021) with {dalle_size:,} parameters and a discrete VAE with {dvae_size:,}. It generates images
of {dvae.image_size} pixels, as a grid of {dalle.grid}x{dalle.grid} codes from a codebook of {dalle.codebook_size}, from
prompts of at most {dalle.text_len} tokens. Exported by lightning_dalle, commit {commit}.

```python
from lightning_dalle import TextToImage

pipeline = TextToImage.from_pretrained("{name}")
pipeline("a prompt")[0].image.save("image.png")
```

| file | content |
|---|---|
{files}

## Data

{data}

## Results

{results}

## Source checkpoints

{sources}
"""

FILES = {
    "dalle.safetensors": "everything that generates images: transformer, dVAE, tokenizer and their configs",
    "clip.safetensors": "CLIP that ranks candidates",
    "tokenizer.json": "copy of the tokenizer for Hugging Face's `tokenizers`, without the padding",
    "config.json": "readable copy of the configs",
}
"""Content of each file of an export, for the model card."""


def export(checkpoint: Path, out: Path, clip: Path | None = None, results: list[Path] | None = None) -> None:
    """Write a DALL-E, its dVAE and tokenizer and a CLIP as safetensors files with a model card.

    `generate` and `TextToImage.from_pretrained` open the folder.

    Args:
        checkpoint: checkpoint of a DALL-E, or folder of a recipe's run or of another export.
        out: folder to write; it must not exist.
        clip: checkpoint of a CLIP of this package, or folder with one; by default the CLIP in the folder `checkpoint`.
        results: JSON files that `test`, `evaluate` or `reproduce` wrote, for the model card; by default the
            report of a recipe's run.
    """
    if out.exists():
        raise UserError(f"{out} already exists; choose another --out")
    if results is None:
        results = list(checkpoint.glob("report.json"))
    measured: dict[str, dict[str, Any]] = {}
    for file in results:
        if file.stem in measured:
            raise UserError(f"two --results are called {file.stem}, the second is {file}; rename one of them")
        measured[file.stem] = read_result(file)

    from lightning_dalle import checkpoints

    source = checkpoints.resolve_checkpoint(checkpoint, "dalle")
    clip = checkpoints.resolve_checkpoint(clip, "clip") if clip else checkpoints.find_in_folder(checkpoint, "clip")
    sources = {"dalle": source} if clip is None else {"dalle": source, "clip": clip}
    loaded = checkpoints.load_dalle(source)
    contents = {name: checkpoints.read_checkpoint(file, name) for name, file in sources.items()}
    dalle, dvae = loaded.dalle.config, loaded.dvae.config
    make_folder(out.parent)
    with atomic_write(out) as partial:  # an interrupted export must not block the next one
        make_folder(partial)
        for name, content in contents.items():
            checkpoints.write_safetensors(partial / f"{name}.safetensors", content)
        loaded.tokenizer.bpe.save(str(partial / "tokenizer.json"))
        configs = {"dalle": asdict(dalle), "dvae": asdict(dvae)}
        (partial / "config.json").write_text(json.dumps(configs, indent=2) + "\n")
        card = CARD.format(
            name=out.name,
            dalle=dalle,
            dvae=dvae,
            dalle_size=sum(parameter.numel() for parameter in loaded.dalle.parameters()),
            dvae_size=sum(parameter.numel() for parameter in loaded.dvae.parameters()),
            commit=commit() or "unknown, since it did not run from a clone",
            files="\n".join(f"| `{name}` | {text} |" for name, text in FILES.items() if (partial / name).exists()),
            data="\n\n".join(_data_section(source, loaded.attribution)),
            results="\n\n".join(_results_section(measured)),
            sources="\n".join(f"- `{name}`: checkpoint with SHA-256 {sha256(file)}" for name, file in sources.items()),
        )
        (partial / "README.md").write_text(card)
    print(f"wrote {out}: {', '.join(sorted(file.name for file in out.iterdir()))}")


def _data_section(checkpoint: Path, attribution: str | None) -> Iterator[str]:
    """Yield the paragraphs about the training data, from the config that Lightning wrote in the run's folder."""
    config = checkpoint.parent.parent / "config.yaml"
    keys = read_yaml(config) if config.is_file() else {}
    if "data" in keys:
        yield f"```yaml\n{yaml.safe_dump(keys['data'], sort_keys=False)}```"
    else:
        yield "The training data is unknown: the checkpoint's run folder had no config with a data section."
    if attribution is not None:
        yield f"The licence of the training images requires this attribution on all generated images: {attribution}"


def _results_section(measured: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the paragraphs about the results: a table, then the protocol of each result."""
    if not measured:
        yield "This model was not evaluated."
        return
    yield markdown_table(measured)
    for name, result in measured.items():
        protocols = yaml.safe_dump(dict(_protocols(result)), sort_keys=False)
        yield f"Protocol of {name}, measured at commit {result['commit']}:\n\n```yaml\n{protocols}```"


def _protocols(result: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every protocol in a result, by the dotted path of its parent."""
    for key, value in result.items():
        if key == "protocol":
            yield path or key, value
        elif isinstance(value, dict):
            yield from _protocols(value, f"{path}.{key}".lstrip("."))
