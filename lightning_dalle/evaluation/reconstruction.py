"""PSNR, SSIM, LPIPS, FID and codebook use of a dVAE's reconstructions of real images."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_dalle.data.images.decoding import UnreadableImage
from lightning_dalle.data.images.transforms import to_image
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.features import FeatureExtractor, ImageList, images_in_folder
from lightning_dalle.evaluation.fidelity import fidelity_by_radius
from lightning_dalle.evaluation.metrics import perplexity, psnr
from lightning_dalle.evaluation.statistics import mean
from lightning_dalle.images import save_png, to_pil
from lightning_dalle.models.dvae import DVAE


@torch.no_grad()
def measure_reconstructions(
    dvae: DVAE, originals: ImageList, folder: Path, extractor: FeatureExtractor, batch_size: int
) -> dict[str, Any]:
    """Return PSNR, SSIM, LPIPS, codebook perplexity and FID of reconstructions by argmax codes.

    Args:
        dvae: model in eval mode, on the device to use.
        originals: real images; unreadable images are skipped and counted.
        folder: folder for the reconstructions as PNG files, which must not contain other images.
        extractor: extractor of the features for FID; only its rank 0 returns figures, others an empty dictionary.
        batch_size: number of images reconstructed at once.

    Raises:
        UserError: if no image can be decoded, or a reconstruction contains NaN or infinite values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    protocol, context, device = extractor.protocol, extractor.context, next(dvae.parameters()).device
    lpips, why_no_lpips = _lpips(device)
    own: dict[str, list[float]] = {"mse": [], "ssim": [], "lpips": []}
    counts = torch.zeros(dvae.config.codebook_size, dtype=torch.long)
    indices = context.indices(len(originals.names))
    for start in track(range(0, len(indices), batch_size), "Reconstructing images"):
        read, names = [], []
        for i in indices[start : start + batch_size]:
            try:
                read.append(to_image(originals.decode(i), dvae.config.image_size))
                names.append(f"{i:06d}.png")
            except UnreadableImage:
                continue  # counted by the extractor
        if read:
            images = torch.stack(read).to(device)
            codes = dvae.encode(images)
            reconstructions = dvae.decode(codes)
            counts += codes.flatten().bincount(minlength=len(counts)).cpu()
            own["mse"] += (reconstructions - images).square().mean((1, 2, 3)).tolist()
            ssim = structural_similarity_index_measure(reconstructions, images, reduction="none", data_range=1.0)
            assert isinstance(ssim, Tensor)
            own["ssim"] += ssim.reshape(-1).tolist()
            if lpips is not None:
                own["lpips"] += lpips(reconstructions, images).tolist()
            for image, name in zip(reconstructions, names, strict=True):
                save_png(to_pil(image), folder / name, None)
    parts: list[dict[str, Any]] = [{**own, "counts": counts}]
    if context.world_size > 1:  # through hidden files, which are not listed as images
        torch.save(parts[0], folder / f".rank{context.rank}.pt")
        context.barrier()
        parts = [torch.load(folder / f".rank{rank}.pt", weights_only=True) for rank in range(context.world_size)]
    joined = {name: [value for part in parts for value in part[name]] for name in own}
    counts = torch.stack([part["counts"] for part in parts]).sum(0)
    if not joined["mse"]:
        raise UserError(f"cannot decode any image in {originals.data_name}: correct the path of the data")
    if not all(math.isfinite(value) for value in joined["mse"]):
        raise UserError("the dVAE's reconstructions are NaN or infinite: training diverged, use an earlier checkpoint")
    generated, reference = extractor(images_in_folder(folder)), extractor(originals)
    if context.rank > 0:
        return {}
    return {
        "psnr_db": psnr(joined["mse"]),
        "ssim": mean(joined["ssim"]),
        "lpips": mean(joined["lpips"]) if joined["lpips"] else {"value": None, "reason": why_no_lpips},
        "codebook_perplexity": {"value": float(perplexity(counts)), "codebook_size": dvae.config.codebook_size},
        "codes_used": int((counts > 0).sum()),
        "by_blur_radius": fidelity_by_radius(generated.features, reference.features, protocol.fidelity),
        **reference.counts(),
        "reference": {"data": originals.data_name, "split": protocol.generation.split},
    }


def _lpips(device: torch.device) -> tuple[Callable[[Tensor, Tensor], Float[Tensor, " n"]] | None, str | None]:
    """Return a function that computes LPIPS of image pairs in [0, 1], or None and why its weights are missing."""
    from torchmetrics.functional.image.lpips import _LPIPS

    try:
        network = _LPIPS(pretrained=True, net="alex", use_dropout=True, eval_mode=True).to(device)
    except OSError as error:
        return None, f"cannot download the AlexNet weights of LPIPS ({error}): copy them to torch hub's cache"
    return lambda made, images: network(made, images, normalize=True).flatten(), None
