"""`evaluate`: any folder of pictures against any other, under a protocol.

Knows folders and where results are filed.
"""

import json
import time
from dataclasses import asdict
from pathlib import Path

from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.files import write_json
from lightning_dalle.provenance import commit
from lightning_dalle.results_table import cautions, markdown, rows


def evaluate(
    images: Path,
    reference: Path,
    protocol: Protocol,
    inception: Path | None = None,
    out: Path = Path("evals/results"),
    cache_dir: Path = Path("~/.cache/lightning_dalle/features"),
    batch_size: int = 32,
    device: str = "auto",
) -> None:
    """Score a folder of pictures against a reference folder; writes a JSON of figures with all that they depend on.

    Args:
        images: generated pictures, of whatever model.
        reference: real pictures.
        protocol: how both are prepared and what is measured; a YAML file of configs/protocols or its keys.
        inception: the Inception weights; $LIGHTNING_DALLE_INCEPTION, or torch hub's cache, if not given.
        out: folder for the result.
        cache_dir: where features are kept, so that no set of pictures is read twice under one protocol.
        batch_size: pictures that are read at once.
        device: cpu, cuda, ..., or auto for the GPU if there is one.
    """
    if out.is_file():
        raise UserError(f"the folder for the result is to be {out}, but that is a file")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but at least 1 picture must be read at once")

    from lightning_dalle.evaluation.features import ImageSet, folder_pictures, read_pictures
    from lightning_dalle.evaluation.fidelity import fidelity
    from lightning_dalle.evaluation.inception import Inception, find_weights
    from lightning_dalle.hardware import describe_hardware, resolve_device
    from lightning_dalle.progress import progress_bar

    begun = time.time()
    folders = {"generated": images, "reference": reference}
    pictures = {side: folder_pictures(folder) for side, folder in folders.items()}
    weights = find_weights(inception)
    network = Inception(weights).to(resolve_device(device))
    sets: dict[str, ImageSet] = {}
    for side in folders:
        with progress_bar(f"Reading {side} pictures") as on_progress:
            sets[side] = read_pictures(
                pictures[side],
                network,
                protocol.preparation,
                protocol.blur_radii,
                batch_size,
                cache_dir.expanduser(),
                on_progress,
            )
    figures = {
        str(radius): fidelity(sets["generated"].features[radius], sets["reference"].features[radius], protocol.fidelity)
        for radius in protocol.blur_radii
    }
    result = {
        "kind": "folders",
        "protocol": {**asdict(protocol), "drawing": None, "reference_count": None},
        "by_blur_radius": figures,
        "sets": {
            side: {
                "folder": str(folders[side]),
                "pictures": len(found.names),
                "skipped": len(found.skipped),
                "first_skipped": dict(list(found.skipped.items())[:10]),
            }
            for side, found in sets.items()
        },
        "inception": {"file": weights.name, "sha256": network.sha256},
        "commit": commit(),
        "machine": describe_hardware(),
        "seconds": round(time.time() - begun, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{time.strftime('%Y-%m-%d_%H%M%S')}_{protocol.name}.json"
    write_json(file, result)
    print(markdown([(file.stem, *row) for row in rows(result)], cautions(result)))
    print(f"protocol: {json.dumps(result['protocol'], default=str)}\nwritten to {file}")
