"""Callback that evaluates a DALL-E's samples of held-out captions during `fit` and in `test`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from datasets import Dataset
from torch.utils.tensorboard import SummaryWriter

from lightning_dalle.checkpoints import weights_digest
from lightning_dalle.evaluation import zero_shot
from lightning_dalle.evaluation.features import DistributedContext
from lightning_dalle.evaluation.inception import Inception
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.images import captioned_grid, to_array
from lightning_dalle.inference.config import check_candidates
from lightning_dalle.inference.pipeline import TextToImage
from lightning_dalle.inference.scorers import Scorer, fingerprint
from lightning_dalle.plots import plot_scores, plot_sweep
from lightning_dalle.progress import progress_bar
from lightning_dalle.training.callbacks.evaluation import Evaluation, Figures, reference_image
from lightning_dalle.training.lit_dalle import LitDALLE


class ZeroShotEvaluation(Evaluation):
    """Callback that compares a DALL-E's samples of captions with real images by FID (paper, section 3.1).

    TensorBoard shows all figures, samples beside real images, and FID and the Inception Score over blur radius and
    number of candidates (Fig. 9); for several candidates also the score and the best of n (Fig. 6). An interrupted
    evaluation resumes.

    Args:
        protocol: settings of the samples and figures.
        scorer: model, such as a CLIP, that scores images for a caption; required to choose among several candidates.
            The mean score of the samples is reported; for a CLIP it is the CLIP score as a cosine.
        **kwargs: arguments of `Evaluation`.
    """

    kind, model = "zero_shot", LitDALLE

    def __init__(self, protocol: Protocol, scorer: Scorer | None = None, **kwargs: Any) -> None:
        super().__init__(protocol, **kwargs)
        self.scorer = scorer

    def check(self, rows: Dataset) -> None:
        """Raise a UserError if captions or reference images cannot be chosen, or if a required scorer is missing."""
        zero_shot.choose_reference(rows, self.protocol)
        zero_shot.choose_captions(rows, self.protocol.generation.captions)
        check_candidates(self.protocol.generation.candidates, has_scorer=self.scorer is not None)

    def evaluate(
        self,
        pl_module: pl.LightningModule,
        rows: Dataset,
        data_name: str,
        inception: Inception,
        context: DistributedContext,
    ) -> Figures:
        """Sample the protocol's captions and return the figures of the samples against the reference images."""
        assert isinstance(pl_module, LitDALLE)
        if isinstance(self.scorer, torch.nn.Module):
            self.scorer.to(pl_module.device)
        generation, tokenizer = self.protocol.generation, pl_module.tokenizer
        pipeline = TextToImage(pl_module.dalle, pl_module.dvae, tokenizer, pl_module.attribution, self.scorer)
        prompts = zero_shot.choose_captions(rows, generation.captions)
        index = zero_shot.reference_index(rows, prompts)
        weights, ranked_by = weights_digest(pl_module.dalle, pl_module.dvae), fingerprint(self.scorer)
        samples = self.samples_folder(weights, tokenizer.to_json(), prompts, asdict(generation), ranked_by)
        folders = zero_shot.sample_folders(samples, generation.candidates)
        with progress_bar("Sampling captions") as on_progress:
            zero_shot.generate_samples(pipeline, prompts, generation, folders, self.batch_size, on_progress, context)
        with progress_bar("Reading images") as on_progress:
            figures = zero_shot.measure_samples(
                folders, len(prompts) * generation.samples_per_caption, rows, data_name, self.protocol, inception,
                self.cache_dir, on_progress, context,
            )  # fmt: skip
        filed = {
            "captions": len(prompts),
            "captions_asked_for": generation.captions.count,
            "captions_with_reference_image": sum(i is not None for i in index),
            **figures,
            "scorer": ranked_by,
            "samples": str(samples),
            "weights": weights,
        }

        def show(writer: SummaryWriter, step: int) -> None:
            name = f"zero_shot_{self.protocol.name}"
            _show_figures(writer, step, name, figures["by_candidates"])
            captions = [prompt.caption for prompt in prompts]
            real = [reference_image(rows, i) for i in index[:16]]
            _show_samples(writer, step, name, folders, captions, real, generation.samples_per_caption)

        return filed, show


def _show_figures(writer: SummaryWriter, step: int, name: str, by_candidates: dict[str, Any]) -> None:
    for n, measured in by_candidates.items():
        for radius, values in measured["by_blur_radius"].items():
            for measure in ("fid", "kid", "precision", "recall", "inception_score"):
                if (value := values[measure]["value"]) is not None:
                    writer.add_scalar(f"{name}/{measure}_best_of_{n}_blur_{radius}", value, step)
        if measured["score"] is not None:
            writer.add_scalar(f"{name}/score_best_of_{n}", measured["score"]["value"], step)
    by_radius = list(by_candidates.values())[-1]["by_blur_radius"]
    if len(by_radius) > 1:
        writer.add_figure(f"{name}/over_blur_radius", plot_sweep(by_radius, "blur radius, pixels"), step)
    if len(by_candidates) > 1:
        first = next(iter(by_radius))
        at_first = {n: measured["by_blur_radius"][first] for n, measured in by_candidates.items()}
        writer.add_figure(f"{name}/over_candidates", plot_sweep(at_first, "candidates"), step)
        writer.add_figure(f"{name}/score_over_candidates", plot_scores(by_candidates), step)


def _show_samples(
    writer: SummaryWriter,
    step: int,
    name: str,
    folders: dict[int, Path],
    captions: list[str],
    real: list[Any],
    per_caption: int,
) -> None:
    first = {n: zero_shot.first_samples(folder, 16 * per_caption) for n, folder in folders.items()}
    if len(folders) > 1:  # Fig. 6
        label = f"best of {', '.join(map(str, folders))}"
        rows = [[samples[i * per_caption] for samples in first.values()] for i in range(len(captions[:8]))]
        grid = captioned_grid(rows, [f"{caption}: {label}" for caption in captions[:8]], 2)
        writer.add_image(f"{name}/best_of", to_array(grid), step, dataformats="HWC")
    best = first[max(folders)]
    rows = [[*best[i * per_caption : (i + 1) * per_caption], image] for i, image in enumerate(real)]
    writer.add_image(
        f"{name}/samples", to_array(captioned_grid(rows, captions[: len(rows)], 4)), step, dataformats="HWC"
    )
