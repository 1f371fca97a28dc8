"""Evaluation of a dVAE's reconstructions in a fit and in `test`."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from datasets import Dataset
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from lightning_dalle.checkpoints import weights_digest
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation import reconstruction, zero_shot
from lightning_dalle.evaluation.features import Processes, dataset_pictures
from lightning_dalle.evaluation.inception import Inception
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.images import captioned_grid, to_array
from lightning_dalle.progress import progress_bar
from lightning_dalle.training.callbacks.evaluation import Evaluation, shown
from lightning_dalle.training.lit_dvae import LitDVAE


class ReconstructionEvaluation(Evaluation):
    """What a dVAE keeps of real pictures: rFID and its kin, PSNR, SSIM, LPIPS where its weights are, codebook use.

    Args:
        protocol: what is measured and how.
        **kwargs: of `Evaluation`.
    """

    kind = "reconstruction"

    def __init__(self, protocol: Protocol, **kwargs: Any) -> None:
        super().__init__(protocol, **kwargs)

    def _figures(
        self,
        pl_module: pl.LightningModule,
        split: Dataset,
        origin: str,
        inception: Inception,
        processes: Processes,
    ) -> tuple[dict[str, Any], Callable[[SummaryWriter, int], None]]:
        if not isinstance(pl_module, LitDVAE):
            raise UserError(f"reconstructions are made by a dVAE, but the model is a {type(pl_module).__name__}")
        originals = zero_shot.choose_reference(split, self.protocol)
        weights = weights_digest(pl_module.dvae)
        pictures = dataset_pictures(originals, origin)
        folder = self._folder(weights, pictures.digest)
        with progress_bar("Reconstructing pictures") as on_progress:
            figures = reconstruction.measure(
                pl_module.dvae, pictures, folder, self.protocol, inception, self.batch_size, self.cache_dir,
                on_progress, processes,
            )  # fmt: skip

        def show(writer: SummaryWriter, step: int) -> None:
            name = f"reconstruction_{self.protocol.name}"
            for measure in ("psnr_db", "ssim", "lpips", "codebook_perplexity"):
                if figures[measure]["value"] is not None:
                    writer.add_scalar(f"{name}/{measure}", figures[measure]["value"], step)
            for radius, values in figures["by_blur_radius"].items():
                writer.add_scalar(f"{name}/rfid_blur_{radius}", values["fid"]["value"], step)
            made = sorted(folder.glob("*.png"))[:16]
            real = [shown(originals, int(path.stem)) for path in made]
            kept = [Image.open(path).convert("RGB") for path in made]
            sheet = captioned_grid([real, kept], ["original", "reconstruction"])
            writer.add_image(f"{name}/pictures", to_array(sheet), step, dataformats="HWC")

        return {**figures, "samples": str(folder), "weights": weights}, show
