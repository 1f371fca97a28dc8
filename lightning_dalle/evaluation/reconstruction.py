"""What a dVAE keeps of real pictures.

Knows a dVAE, pictures and measures. Knows nothing of training or of how results are shown.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from lightning_dalle.data.images.decoding import Unreadable
from lightning_dalle.data.images.transforms import to_image
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.features import ImageSet, Pictures, Processes, folder_pictures, read_pictures
from lightning_dalle.evaluation.fidelity import fidelity
from lightning_dalle.evaluation.inception import Inception
from lightning_dalle.evaluation.metrics import perplexity
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.evaluation.statistics import mean, psnr
from lightning_dalle.images import save, to_pil
from lightning_dalle.models.dvae import DVAE


@torch.no_grad()
def measure(
    dvae: DVAE,
    originals: Pictures,
    folder: Path,
    protocol: Protocol,
    inception: Inception,
    batch_size: int,
    cache_dir: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    processes: Processes = Processes(),  # noqa: B008 (immutable)
) -> dict[str, Any]:
    """PSNR, SSIM, LPIPS, codebook use, and FID and its kin of reconstructions by argmax codes against the originals.

    Every process reconstructs its own share into the folder, and the first returns the figures of the whole.

    Args:
        dvae: in eval mode, on the device to use.
        originals: real pictures; one that cannot be read is passed over and counted.
        folder: where reconstructions are kept, as PNG; of these pictures and this dVAE alone.
        protocol: how both sides are prepared and what is measured.
        inception: the network, on the same device.
        batch_size: images at once.
        cache_dir: where features are kept.
        on_progress: told how many pictures of how many are done, of this process's share.
        processes: that share the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(dvae.parameters()).device
    perceptual, why_not = _lpips(device)
    shares: list[dict[str, Any]] = []
    share: dict[str, Any] = {"mse": [], "ssim": [], "lpips": [], "codes": [], "skipped": {}}
    indices = range(processes.rank, len(originals.names), processes.world)
    for start in range(0, len(indices), batch_size):
        some, names = [], []
        for i in indices[start : start + batch_size]:
            try:
                some.append(to_image(originals.open(i), dvae.config.image_size))
                names.append(f"{i:06d}.png")
            except Unreadable as error:
                share["skipped"][originals.names[i]] = error.reason
        if some:
            images = torch.stack(some).to(device)
            codes = dvae.encode(images)
            made = dvae.decode(codes)
            share["codes"].append(codes.flatten().bincount(minlength=dvae.config.codebook_size).cpu())
            share["mse"] += (made - images).square().mean((1, 2, 3)).tolist()
            ssim = structural_similarity_index_measure(made, images, reduction="none", data_range=1.0)
            assert isinstance(ssim, Tensor)
            share["ssim"] += ssim.reshape(-1).tolist()
            if perceptual is not None:
                share["lpips"] += perceptual(made, images).tolist()
            for image, name in zip(made, names, strict=True):
                save(to_pil(image), folder / name, None)
        on_progress(min(start + batch_size, len(indices)), len(indices))
    if processes.world == 1:
        shares = [share]
    else:  # through files, as all that processes share here
        torch.save(share, folder / f"share.{processes.rank}.pt")
        processes.barrier()
        shares = [torch.load(folder / f"share.{rank}.pt", weights_only=True) for rank in range(processes.world)]
    joined = {name: [value for each in shares for value in each[name]] for name in ("mse", "ssim", "lpips")}
    if not joined["mse"]:
        raise UserError(f"none of the {len(originals.names)} pictures of {originals.origin} can be read")
    if not all(math.isfinite(value) for value in joined["mse"]):
        raise UserError("the dVAE's reconstructions are no numbers: it diverged in training")
    counts = torch.stack([counts for each in shares for counts in each["codes"]]).sum(0)
    skipped = {name: reason for each in shares for name, reason in each["skipped"].items()}

    def read(pictures: Pictures) -> ImageSet:
        return read_pictures(
            pictures, inception, protocol.preparation, protocol.blur_radii, batch_size, cache_dir, processes=processes
        )

    generated, reference = read(folder_pictures(folder)), read(originals)
    if processes.rank > 0:
        return {}  # the figures are the first process's to take
    return {
        "psnr_db": psnr(joined["mse"]),
        "ssim": mean(joined["ssim"]),
        "lpips": mean(joined["lpips"]) if joined["lpips"] else {"value": None, "refused": why_not},
        "codebook_perplexity": {"value": float(perplexity(counts)), "codebook_size": dvae.config.codebook_size},
        "codes_used": int((counts > 0).sum()),
        "by_blur_radius": {
            str(radius): fidelity(generated.features[radius], reference.features[radius], protocol.fidelity)
            for radius in protocol.blur_radii
        },
        "pictures": len(joined["mse"]),
        "skipped": len(skipped),
        "first_skipped": dict(list(skipped.items())[:10]),
        "reference": {"data": originals.origin, "split": protocol.drawing.split},
    }


def _lpips(device: torch.device) -> tuple[Callable[[Tensor, Tensor], Float[Tensor, " n"]] | None, str | None]:
    """LPIPS (AlexNet) of each pair of images in [0, 1]; or why its weights cannot be had."""
    from torchmetrics.functional.image.lpips import _LPIPS

    try:
        network = _LPIPS(pretrained=True, net="alex", use_dropout=True, eval_mode=True).to(device)
    except OSError as error:  # there is no network, and torch hub's cache does not hold AlexNet
        return None, f"the AlexNet weights of LPIPS cannot be had: {error}"
    return lambda made, images: network(made, images, normalize=True).flatten(), None
