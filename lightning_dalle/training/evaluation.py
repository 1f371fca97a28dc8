"""Evaluation as callbacks: what a trained model draws, or keeps of a picture, against real pictures.

Knows the Trainer's hooks and its logger. The figures come from `evaluation`, the pictures from `inference`.
"""

import hashlib
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from datasets import Dataset
from PIL import Image
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_dalle import machine
from lightning_dalle.data.datamodule import CaptionedImageDataModule, Source, image_transform
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation import reconstruction, zero_shot
from lightning_dalle.evaluation.image_sets import Processes
from lightning_dalle.evaluation.inception import Inception, find_weights
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.inference.pipeline import TextToImage
from lightning_dalle.inference.scorers import Scorer
from lightning_dalle.pictures import captioned_grid, progress, to_array, to_pil
from lightning_dalle.plots import sweep
from lightning_dalle.records import commit, sha256, write_whole
from lightning_dalle.training.lit_dalle import LitDALLE
from lightning_dalle.training.lit_dvae import LitDVAE

log = logging.getLogger(__name__)


class Evaluation(Callback):
    """What both evaluations share: when they run, their Inception, where their pictures and results go.

    Args:
        protocol: what is measured and how.
        every_n_validations: evaluate in a fit too, at every n-th validation; 0 evaluates in `test` alone.
        source: of the reference pictures and captions; the run's own data if not given.
        inception: the Inception weights; $LIGHTNING_DALLE_INCEPTION, or torch hub's cache, if not given.
        samples_dir: where pictures are kept, in a folder named by a hash of the weights and of all that they depend on:
            an evaluation that was interrupted goes on where it was.
        results_dir: where `test` files its results; a fit's go beside its logs.
        cache_dir: where Inception's features are kept.
        batch_size: pictures made or read at once.
    """

    kind: str

    def __init__(
        self,
        protocol: Protocol,
        every_n_validations: int = 0,
        source: Source | None = None,
        inception: Path | None = None,
        samples_dir: Path = Path("evals/samples"),
        results_dir: Path = Path("evals/results"),
        cache_dir: Path = Path("~/.cache/lightning_dalle/features"),
        batch_size: int = 64,
    ) -> None:
        self.protocol, self.every_n_validations, self.source = protocol, every_n_validations, source
        self.inception, self.samples_dir, self.results_dir = inception, samples_dir, results_dir
        self.cache_dir, self.batch_size = cache_dir.expanduser(), batch_size
        self.validations = 0
        self.reference: tuple[Dataset, str, int | None] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "test" or self.every_n_validations:
            self.inception = find_weights(self.inception)  # a mistake is told before anything is drawn

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """At the first batch, since averaged weights are swapped in before it and out before other hooks may come."""
        if trainer.sanity_checking or batch_idx > 0 or not self.every_n_validations:
            return
        self.validations += 1
        if self.validations % self.every_n_validations == 0:
            assert trainer.log_dir is not None
            self._evaluate(trainer, pl_module, Path(trainer.log_dir) / "evaluation")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not before, so that what the model itself measured, such as bits per code, is there to be filed too."""
        self._evaluate(trainer, pl_module, self.results_dir)

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule, results_dir: Path) -> None:
        begun = time.time()
        processes = Processes(trainer.global_rank, trainer.world_size, trainer.strategy.barrier)
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if self.reference is None:  # once: the pictures of the training data are all read for it
            self.reference = self._reference(datamodule)
        split, origin, shared = self.reference
        assert self.inception is not None
        inception = Inception(self.inception).to(pl_module.device)
        writer = None
        if trainer.is_global_zero and isinstance(trainer.logger, TensorBoardLogger):
            writer = trainer.logger.experiment
        figures = self._figures(pl_module, split, origin, inception, processes, writer, trainer)
        if not trainer.is_global_zero:
            return
        checkpoint = Path(trainer.ckpt_path) if trainer.ckpt_path and Path(trainer.ckpt_path).is_file() else None
        config = Path(trainer.log_dir or ".") / "config.yaml"
        result = {
            "kind": self.kind,
            "protocol": asdict(self.protocol),
            **figures,
            "reference_pictures_in_training_data": shared,
            "measured_by_the_model": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "step": trainer.global_step,
            "checkpoint": {"file": checkpoint.name, "sha256": sha256(checkpoint)} if checkpoint else None,
            "inception": {"file": self.inception.name, "sha256": inception.sha256},
            "config": {"file": str(config), "sha256": sha256(config)} if config.is_file() else None,
            "commit": commit(),
            "machine": machine.describe(),
            "seconds": round(time.time() - begun, 1),
        }
        results_dir.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%d_%H%M%S")
        file = results_dir / f"{stamp}_{self.protocol.name}_{self.kind}_{trainer.global_step}.json"
        write_whole(file, json.dumps(result, indent=2, default=str) + "\n")
        log.info("%s by protocol %s: %s", self.kind, self.protocol.name, file)

    def _reference(self, datamodule: CaptionedImageDataModule) -> tuple[Dataset, str, int | None]:
        """The split of the reference, what its data is called, and how much of it was trained on."""
        source = self.source or datamodule.source
        splits = source.load(datamodule.image_size)
        name = self.protocol.drawing.split
        origin = str(getattr(source, "path", type(source).__name__))
        if name not in splits:
            raise UserError(
                f"the protocol {self.protocol.name} reads the split {name}, but {origin} has {', '.join(splits)}"
            )
        training = datamodule.splits.get("train") if datamodule.splits is not None else None
        shared = None if training is None else zero_shot.shared_pictures(training, splits[name])
        if shared:
            log.warning("%d of the %d reference pictures are in the training data too", shared, len(splits[name]))
        return splits[name], origin, shared

    def _folder(self, *depends_on: object) -> Path:
        """Of the pictures of these weights under these settings."""
        digest = hashlib.sha256(json.dumps(depends_on, default=str, sort_keys=True).encode()).hexdigest()[:12]
        return self.samples_dir / f"{self.protocol.name}-{digest}"

    def _figures(
        self,
        pl_module: pl.LightningModule,
        split: Dataset,
        origin: str,
        inception: Inception,
        processes: Processes,
        writer: SummaryWriter | None,
        trainer: pl.Trainer,
    ) -> dict[str, Any]:
        raise NotImplementedError


class ZeroShotEvaluation(Evaluation):
    """Draws a protocol's captions, keeps the best of each caption's candidates, and scores them (paper, section 3.1).

    TensorBoard gets every measure, the first pictures beside the real ones, and FID and the Inception Score over blur
    radius and over the number of candidates (Fig. 9).

    Args:
        protocol: what is measured and how.
        scorer: tells which candidate is best; needed for more than one, and else the mean score is reported.
        every_n_validations: evaluate in a fit too, at every n-th validation; 0 evaluates in `test` alone.
        source: of the reference pictures and captions; the run's own data if not given.
        inception: the Inception weights; $LIGHTNING_DALLE_INCEPTION, or torch hub's cache, if not given.
        samples_dir: where pictures are kept, in a folder named by a hash of the weights and of all that they depend on:
            an evaluation that was interrupted goes on where it was.
        results_dir: where `test` files its results; a fit's go beside its logs.
        cache_dir: where Inception's features are kept.
        batch_size: pictures made or read at once.
    """

    kind = "zero_shot"

    def __init__(
        self,
        protocol: Protocol,
        scorer: Scorer | None = None,
        every_n_validations: int = 0,
        source: Source | None = None,
        inception: Path | None = None,
        samples_dir: Path = Path("evals/samples"),
        results_dir: Path = Path("evals/results"),
        cache_dir: Path = Path("~/.cache/lightning_dalle/features"),
        batch_size: int = 64,
    ) -> None:
        super().__init__(
            protocol, every_n_validations, source, inception, samples_dir, results_dir, cache_dir, batch_size
        )
        self.scorer = scorer

    def _figures(
        self,
        pl_module: pl.LightningModule,
        split: Dataset,
        origin: str,
        inception: Inception,
        processes: Processes,
        writer: SummaryWriter | None,
        trainer: pl.Trainer,
    ) -> dict[str, Any]:
        if not isinstance(pl_module, LitDALLE):
            raise UserError(
                f"pictures of captions are drawn by a DALL-E, but the model is a {type(pl_module).__name__}"
            )
        assert pl_module.dalle is not None
        assert pl_module.dvae is not None
        drawing = self.protocol.drawing
        attribution = getattr(trainer.datamodule.source, "attribution", None)  # type: ignore[attr-defined]
        pipeline = TextToImage(pl_module.dalle, pl_module.dvae, pl_module.tokenizer, attribution)
        prompts = zero_shot.choose_captions(split, drawing.captions)
        wanted = drawing.captions.count
        if wanted is not None and len(prompts) < wanted:
            log.warning("%s asks for %d captions, but there are %d", self.protocol.name, wanted, len(prompts))
        weights = zero_shot.weights_digest(pl_module.dalle, pl_module.dvae)
        folder = self._folder(weights, pl_module.tokenizer.to_json(), prompts, asdict(drawing), repr(self.scorer))
        with progress("Drawing captions") as on_progress:
            zero_shot.draw_pictures(
                pipeline, prompts, drawing, folder, self.scorer, self.batch_size, on_progress, processes
            )
        with progress("Reading pictures") as on_progress:
            figures = zero_shot.measure(
                folder, split, origin, self.protocol, inception, self.batch_size, self.cache_dir, on_progress, processes
            )
        if writer is not None:
            self._show(writer, folder, split, prompts, figures, trainer.global_step)
        return {
            "captions": len(prompts),
            **figures,
            "scorer": None if self.scorer is None else type(self.scorer).__name__,
            "samples": str(folder),
            "weights": weights,
        }

    def _show(
        self,
        writer: SummaryWriter,
        folder: Path,
        split: Dataset,
        prompts: list[zero_shot.Prompt],
        figures: dict[str, Any],
        step: int,
    ) -> None:
        by_candidates = figures["by_candidates"]
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
        best = list(by_candidates)[-1]
        over_radius = by_candidates[best]["by_blur_radius"]
        if len(over_radius) > 1:
            writer.add_figure(f"{name}/over_blur_radius", sweep(over_radius, "blur radius, pixels"), step)
        if len(by_candidates) > 1:
            first = next(iter(over_radius))
            over_size = {size: measured["by_blur_radius"][first] for size, measured in by_candidates.items()}
            writer.add_figure(f"{name}/over_candidates", sweep(over_size, "candidates"), step)
        per_caption = self.protocol.drawing.samples_per_caption
        made = zero_shot.first_pictures(folder, int(best), 16 * per_caption)
        real = dict(zip(split["id"][:], range(len(split)), strict=True)) if "id" in split.column_names else {}
        rows, captions = [], []
        for i, prompt in enumerate(prompts[: len(made) // per_caption]):
            place = real.get(prompt.picture, int(prompt.picture) if not real and prompt.picture else None)
            shown = made[i * per_caption : (i + 1) * per_caption]
            blank = Image.new("RGB", shown[0].size, "white")
            rows.append([*shown, blank if place is None else square(split[place]["image"])])
            captions.append(prompt.caption)
        writer.add_image(f"{name}/samples", to_array(captioned_grid(rows, captions, 4)), step, dataformats="HWC")


class ReconstructionEvaluation(Evaluation):
    """What a dVAE keeps of real pictures: rFID and its kin, PSNR, SSIM, LPIPS where its weights are, codebook use."""

    kind = "reconstruction"

    def _figures(
        self,
        pl_module: pl.LightningModule,
        split: Dataset,
        origin: str,
        inception: Inception,
        processes: Processes,
        writer: SummaryWriter | None,
        trainer: pl.Trainer,
    ) -> dict[str, Any]:
        if not isinstance(pl_module, LitDVAE):
            raise UserError(f"reconstructions are made by a dVAE, but the model is a {type(pl_module).__name__}")
        rows = zero_shot.choose_reference(split, self.protocol)
        weights = zero_shot.weights_digest(pl_module.dvae)
        folder = self._folder(weights, origin, self.protocol.reference_count, pl_module.dvae.config.image_size)
        with progress("Reconstructing pictures") as on_progress:
            figures = reconstruction.measure(
                pl_module.dvae, rows, origin, folder, self.protocol, inception, self.batch_size, self.cache_dir,
                on_progress, processes,
            )  # fmt: skip
        if writer is not None:
            name = f"reconstruction_{self.protocol.name}"
            for measure in ("psnr_db", "ssim", "lpips", "codebook_perplexity"):
                if figures[measure]["value"] is not None:
                    writer.add_scalar(f"{name}/{measure}", figures[measure]["value"], trainer.global_step)
            for radius, values in figures["by_blur_radius"].items():
                writer.add_scalar(f"{name}/rfid_blur_{radius}", values["fid"]["value"], trainer.global_step)
            transform = image_transform(pl_module.dvae.config.image_size)
            originals = [to_pil(transform(rows[i]["image"])) for i in range(min(16, len(rows)))]
            made = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))[:16]]
            sheet = captioned_grid([originals, made], ["original", "reconstruction"])
            writer.add_image(f"{name}/pictures", to_array(sheet), trainer.global_step, dataformats="HWC")
        return {**figures, "samples": str(folder), "weights": weights}


def square(picture: Image.Image) -> Image.Image:
    """The middle square of a picture."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.convert("RGB").crop((left, top, left + side, top + side))
