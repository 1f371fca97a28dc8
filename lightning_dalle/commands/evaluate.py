"""`evaluate`: compares a folder of generated images with a folder of real images by FID and other measures."""

import time
from dataclasses import asdict
from pathlib import Path

from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.protocol import Protocol, check_at_least


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
    """Compare generated images with real images by FID and other measures, and write the figures to a JSON file.

    Args:
        images: folder of generated images, of any model.
        reference: folder of real images.
        protocol: preprocessing and measures; a YAML file of configs/protocols or its keys.
        inception: Inception weights; default: $LIGHTNING_DALLE_INCEPTION, or torch hub's cache.
        out: folder for the JSON file.
        cache_dir: folder for a cache of Inception features, so that a protocol reads each folder of images only once.
        batch_size: number of images per forward pass; values other than the default change the last digits of figures.
        device: device of the Inception network: cpu, cuda, ..., or auto for the GPU if there is one.
    """
    if out.is_file():
        raise UserError(f"cannot write a result into {out}: it is a file; choose a folder as --out")
    check_at_least(1, batch_size=batch_size)

    from lightning_dalle.evaluation.features import FeatureExtractor, images_in_folder
    from lightning_dalle.evaluation.fidelity import fidelity_by_radius
    from lightning_dalle.evaluation.inception import Inception, find_or_download_weights
    from lightning_dalle.evaluation.result_file import write_result
    from lightning_dalle.hardware import resolve_device

    begun = time.time()
    sides = {"generated": images_in_folder(images), "reference": images_in_folder(reference)}
    weights = find_or_download_weights(inception)
    network = Inception(weights).to(resolve_device(device))
    extractor = FeatureExtractor(network, protocol, cache_dir.expanduser(), batch_size)
    sets = {side: extractor(listed) for side, listed in sides.items()}
    result = {
        "kind": "folders",
        "protocol": {**asdict(protocol), "generation": None, "reference": None, "reference_count": None},
        "by_blur_radius": fidelity_by_radius(sets["generated"].features, sets["reference"].features, protocol.fidelity),
        "sets": {
            side: {"folder": sides[side].data_name, **found.counts(), "ignored": dict(sides[side].ignored)}
            for side, found in sets.items()
        },
        "inception": {"file": weights.name, "sha256": network.sha256},
    }
    write_result(out, protocol.name, result, begun)
