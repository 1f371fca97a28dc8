"""Zero-shot evaluation of a DALL-E in a fit and in `test`."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from datasets import Dataset
from torch.utils.tensorboard import SummaryWriter

from lightning_dalle.checkpoints import weights_digest
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation import zero_shot
from lightning_dalle.evaluation.features import Processes
from lightning_dalle.evaluation.inception import Inception
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.images import captioned_grid, to_array
from lightning_dalle.inference.pipeline import TextToImage
from lightning_dalle.inference.scorers import Scorer, identity
from lightning_dalle.plots import scores, sweep
from lightning_dalle.progress import progress_bar
from lightning_dalle.training.callbacks.evaluation import Evaluation, shown
from lightning_dalle.training.lit_dalle import LitDALLE


class ZeroShotEvaluation(Evaluation):
    """Draws a protocol's captions, keeps the best of each caption's candidates, and scores them (paper, section 3.1).

    TensorBoard gets every measure, the first pictures beside the real ones, FID and the Inception Score over blur
    radius and over the number of candidates (Fig. 9), and with candidates the score over their number and the best of
    each number side by side (Fig. 6). An evaluation that was interrupted goes on where it was.

    Args:
        protocol: what is measured and how.
        scorer: tells which candidate is best; needed for more than one. With one candidate its mean score is reported,
            which for a CLIP is the CLIP score (as a cosine).
        **kwargs: of `Evaluation`.
    """

    kind = "zero_shot"

    def __init__(self, protocol: Protocol, scorer: Scorer | None = None, **kwargs: Any) -> None:
        super().__init__(protocol, **kwargs)
        self.scorer = scorer

    def check(self, split: Dataset) -> None:
        zero_shot.choose_captions(split, self.protocol.drawing.captions)
        zero_shot.check_scorer(self.protocol.drawing, self.scorer)

    def _figures(
        self,
        pl_module: pl.LightningModule,
        split: Dataset,
        origin: str,
        inception: Inception,
        processes: Processes,
    ) -> tuple[dict[str, Any], Callable[[SummaryWriter, int], None]]:
        if not isinstance(pl_module, LitDALLE):
            raise UserError(
                f"pictures of captions are drawn by a DALL-E, but the model is a {type(pl_module).__name__}"
            )
        assert pl_module.dalle is not None
        assert pl_module.dvae is not None
        if isinstance(self.scorer, torch.nn.Module):
            self.scorer.to(pl_module.device)
        drawing = self.protocol.drawing
        pipeline = TextToImage(pl_module.dalle, pl_module.dvae, pl_module.tokenizer, pl_module.attribution)
        prompts = zero_shot.choose_captions(split, drawing.captions)
        places = zero_shot.places(split, prompts)
        weights = weights_digest(pl_module.dalle, pl_module.dvae)
        ranked_by = identity(self.scorer)
        folder = self._folder(weights, pl_module.tokenizer.to_json(), prompts, asdict(drawing), ranked_by)
        with progress_bar("Drawing captions") as on_progress:
            zero_shot.draw_pictures(
                pipeline, prompts, drawing, folder, self.scorer, self.batch_size, on_progress, processes
            )
        with progress_bar("Reading pictures") as on_progress:
            figures = zero_shot.measure(
                folder, len(prompts) * drawing.samples_per_caption, split, origin, self.protocol, inception,
                self.batch_size, self.cache_dir, on_progress, processes,
            )  # fmt: skip
        filed = {
            "captions": len(prompts),
            "captions_asked_for": drawing.captions.count,
            "captions_with_a_reference_picture": sum(place is not None for place in places),
            **figures,
            "scorer": ranked_by,
            "samples": str(folder),
            "weights": weights,
        }

        def show(writer: SummaryWriter, step: int) -> None:
            self._show(writer, step, folder, figures["by_candidates"], split, prompts, places)

        return filed, show

    def _show(
        self,
        writer: SummaryWriter,
        step: int,
        folder: Path,
        by_candidates: dict[str, Any],
        split: Dataset,
        prompts: list[zero_shot.Prompt],
        places: list[int | None],
    ) -> None:
        name = f"zero_shot_{self.protocol.name}"
        for size, measured in by_candidates.items():
            for radius, values in measured["by_blur_radius"].items():
                for measure in ("fid", "kid", "precision", "recall", "inception_score"):
                    if values[measure]["value"] is not None:
                        writer.add_scalar(
                            f"{name}/{measure}_best_of_{size}_blur_{radius}", values[measure]["value"], step
                        )
            if measured["score"] is not None:
                writer.add_scalar(f"{name}/score_best_of_{size}", measured["score"]["value"], step)
        per_caption = self.protocol.drawing.samples_per_caption
        best = list(by_candidates)[-1]
        over_radius = by_candidates[best]["by_blur_radius"]
        if len(over_radius) > 1:
            writer.add_figure(f"{name}/over_blur_radius", sweep(over_radius, "blur radius, pixels"), step)
        if len(by_candidates) > 1:
            first = next(iter(over_radius))
            over_size = {size: measured["by_blur_radius"][first] for size, measured in by_candidates.items()}
            writer.add_figure(f"{name}/over_candidates", sweep(over_size, "candidates"), step)
            writer.add_figure(f"{name}/score_over_candidates", scores(by_candidates), step)
            captions = [prompt.caption for prompt in prompts[:8]]
            columns = [zero_shot.first_pictures(folder, int(size), 8 * per_caption) for size in by_candidates]
            ranked = [[column[i * per_caption] for column in columns] for i in range(len(captions))]
            sheet = captioned_grid(ranked, [f"{c}: best of {', '.join(by_candidates)}" for c in captions], 2)
            writer.add_image(f"{name}/best_of", to_array(sheet), step, dataformats="HWC")  # Fig. 6
        made = zero_shot.first_pictures(folder, int(best), 16 * per_caption)
        grid = [
            [*made[i * per_caption : (i + 1) * per_caption], shown(split, place)]
            for i, place in enumerate(places[: len(made) // per_caption])
        ]
        captions = [prompt.caption for prompt in prompts[: len(grid)]]
        writer.add_image(f"{name}/samples", to_array(captioned_grid(grid, captions, 4)), step, dataformats="HWC")
