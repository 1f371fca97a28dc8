"""Callback that evaluates a dVAE's reconstructions during `fit` and in `test`."""

import pytorch_lightning as pl
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image

from lightning_dalle.checkpoints import weights_digest
from lightning_dalle.evaluation.features import FeatureExtractor, images_in_dataset
from lightning_dalle.evaluation.reconstruction import measure_reconstructions
from lightning_dalle.evaluation.zero_shot import choose_reference, first_samples
from lightning_dalle.images import captioned_grid
from lightning_dalle.training.callbacks.evaluation import Evaluation, Figures, reference_image
from lightning_dalle.training.lit_dvae import LitDVAE


class ReconstructionEvaluation(Evaluation):
    """Callback that measures a dVAE's reconstructions: PSNR, SSIM, FID, codebook use and LPIPS if possible."""

    kind, model = "reconstruction", LitDVAE

    def evaluate(
        self, pl_module: pl.LightningModule, rows: Dataset, data_name: str, extractor: FeatureExtractor
    ) -> Figures:
        """Reconstruct the reference images and return the figures of the reconstructions."""
        assert isinstance(pl_module, LitDVAE)
        reference = choose_reference(rows, self.protocol)
        originals = images_in_dataset(reference, data_name)
        weights = weights_digest(pl_module.dvae)
        folder = self.samples_folder(weights, originals.digest)
        figures = measure_reconstructions(pl_module.dvae, originals, folder, extractor, self.batch_size)

        name, scalars = f"reconstruction_{self.protocol.name}", {}
        if extractor.context.rank == 0:
            for measure in ("psnr_db", "ssim", "lpips", "codebook_perplexity"):
                scalars[f"{name}/{measure}"] = figures[measure]["value"]
            for radius, values in figures["by_blur_radius"].items():
                scalars[f"{name}/rfid_blur_{radius}"] = values["fid"]["value"]

        def images() -> dict[str, Image.Image | Figure]:
            files = sorted(folder.glob("*.png"))[:16]
            rows = [[reference_image(reference, int(file.stem)) for file in files], first_samples(folder, 16)]
            return {f"{name}/images": captioned_grid(rows, ["original", "reconstruction"])}

        measured = {measure: value for measure, value in scalars.items() if value is not None}
        return Figures({**figures, "samples": str(folder), "weights": weights}, measured, images)
