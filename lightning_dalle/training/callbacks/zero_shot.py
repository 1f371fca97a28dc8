"""Callback that evaluates a DALL-E's samples of held-out captions during `fit` and in `test`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image

from lightning_dalle.checkpoints import weights_digest
from lightning_dalle.evaluation import zero_shot
from lightning_dalle.evaluation.features import FeatureExtractor
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.images import captioned_grid
from lightning_dalle.inference.config import check_candidates
from lightning_dalle.inference.scorers import Scorer, fingerprint
from lightning_dalle.plots import plot_scores, plot_sweep
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
        self, pl_module: pl.LightningModule, rows: Dataset, data_name: str, extractor: FeatureExtractor
    ) -> Figures:
        """Sample the protocol's captions and return the figures of the samples against the reference images."""
        assert isinstance(pl_module, LitDALLE)
        if isinstance(self.scorer, torch.nn.Module):
            self.scorer.to(pl_module.device)
        generation, pipeline = self.protocol.generation, pl_module.pipeline(self.scorer)
        prompts = zero_shot.choose_captions(rows, generation.captions)
        index = zero_shot.reference_index(rows, prompts)
        weights, ranked_by = weights_digest(pl_module.dalle, pl_module.dvae), fingerprint(self.scorer)
        samples = self.samples_folder(weights, pipeline.tokenizer.to_json(), prompts, asdict(generation), ranked_by)
        folders = {n: samples / f"best_of_{n}" for n in generation.candidates}
        zero_shot.generate_samples(pipeline, prompts, generation, folders, self.batch_size, extractor.context)
        count = len(prompts) * generation.samples_per_caption
        figures = zero_shot.measure_samples(folders, count, rows, data_name, extractor)
        filed = {
            "captions": len(prompts),
            "captions_asked_for": generation.captions.count,
            "captions_with_reference_image": sum(i is not None for i in index),
            **figures,
            "scorer": ranked_by,
            "samples": str(samples),
            "weights": weights,
        }

        name = f"zero_shot_{self.protocol.name}"

        def images() -> dict[str, Image.Image | Figure]:
            captions = [prompt.caption for prompt in prompts]
            real = [reference_image(rows, i) for i in index[:16]]
            samples = _draw_samples(folders, captions, real, generation.samples_per_caption)
            drawn: dict[str, Image.Image | Figure] = {**_plot(figures["by_candidates"]), **samples}
            return {f"{name}/{kind}": image for kind, image in drawn.items()}

        return Figures(filed, _scalars(name, figures["by_candidates"]) if extractor.context.rank == 0 else {}, images)


def _scalars(name: str, by_candidates: dict[str, Any]) -> dict[str, float]:
    scalars = {}
    for n, measured in by_candidates.items():
        for radius, values in measured["by_blur_radius"].items():
            for measure in ("fid", "kid", "precision", "recall", "inception_score"):
                scalars[f"{name}/{measure}_best_of_{n}_blur_{radius}"] = values[measure]["value"]
        if measured["score"] is not None:
            scalars[f"{name}/score_best_of_{n}"] = measured["score"]["value"]
    return {measure: value for measure, value in scalars.items() if value is not None}


def _plot(by_candidates: dict[str, Any]) -> dict[str, Figure]:
    figures = {}
    by_radius = list(by_candidates.values())[-1]["by_blur_radius"]
    if len(by_radius) > 1:
        figures["over_blur_radius"] = plot_sweep(by_radius, "blur radius, pixels")
    if len(by_candidates) > 1:
        first = next(iter(by_radius))
        at_first = {n: measured["by_blur_radius"][first] for n, measured in by_candidates.items()}
        figures["over_candidates"] = plot_sweep(at_first, "candidates")
        figures["score_over_candidates"] = plot_scores(by_candidates)
    return figures


def _draw_samples(
    folders: dict[int, Path], captions: list[str], real: list[Image.Image], per_caption: int
) -> dict[str, Image.Image]:
    first = {n: zero_shot.first_samples(folder, 16 * per_caption) for n, folder in folders.items()}
    drawn = {}
    if len(folders) > 1:  # Fig. 6
        label = f"best of {', '.join(map(str, folders))}"
        rows = [[samples[i * per_caption] for samples in first.values()] for i in range(len(captions[:8]))]
        drawn["best_of"] = captioned_grid(rows, [f"{caption}: {label}" for caption in captions[:8]], 2)
    best = first[max(folders)]
    rows = [[*best[i * per_caption : (i + 1) * per_caption], image] for i, image in enumerate(real)]
    drawn["samples"] = captioned_grid(rows, captions[: len(rows)], 4)
    return drawn
