"""Evaluation as callbacks: what a trained model draws, or keeps of a picture, against real pictures.

Knows the Trainer's hooks and its logger. The figures come from `evaluation`, the pictures from `inference`.
"""

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from datasets import Dataset
from datasets import Image as EncodedImage
from PIL import Image, ImageOps
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.tensorboard import SummaryWriter

from lightning_dalle import machine
from lightning_dalle.checkpoints import read_checkpoint, weights_digest
from lightning_dalle.data.captioned import complete
from lightning_dalle.data.datamodule import CaptionedImageDataModule, Source
from lightning_dalle.data.reading import Unreadable, read_picture
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation import reconstruction, zero_shot
from lightning_dalle.evaluation.image_sets import Processes, dataset_pictures
from lightning_dalle.evaluation.inception import VARIABLE, Inception, find_weights, is_declined
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.inference.pipeline import TextToImage
from lightning_dalle.inference.scorers import Scorer, identity
from lightning_dalle.pictures import captioned_grid, progress, to_array
from lightning_dalle.plots import scores, sweep
from lightning_dalle.records import commit, sha256, write_json
from lightning_dalle.tables import cautions, markdown, rows
from lightning_dalle.training.lit_dalle import LitDALLE
from lightning_dalle.training.lit_dvae import LitDVAE
from lightning_dalle.training.sharding import needs_the_whole_model


class Evaluation(Callback):
    """What both evaluations share: when they run, their Inception, where their pictures and results go.

    Args:
        protocol: what is measured and how.
        every_n_validations: evaluate in a fit too, at every n-th validation; 0 evaluates in `test` alone.
        source: of the reference pictures and captions; the run's own data if not given.
        trained_on: what the checkpoint was trained on, to count the reference pictures among it; a fit knows it, and
            `test` leaves the count out if it is not given.
        inception: the Inception weights; $LIGHTNING_DALLE_INCEPTION, or torch hub's cache, if not given. Where that is
            `none`, fits go without the evaluation.
        samples_dir: where pictures are kept, in a folder named by a hash of the weights and of all that they depend on.
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
        trained_on: Source | None = None,
        inception: Path | None = None,
        samples_dir: Path = Path("evals/samples"),
        results_dir: Path = Path("evals/results"),
        cache_dir: Path = Path("~/.cache/lightning_dalle/features"),
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"the evaluation's batch_size is {batch_size}, but must be at least 1")
        self.protocol, self.every_n_validations, self.source = protocol, every_n_validations, source
        self.trained_on = trained_on
        self.inception, self.samples_dir, self.results_dir = inception, samples_dir, results_dir
        self.cache_dir, self.batch_size = cache_dir.expanduser(), batch_size
        self.validations = 0
        self.shared: dict[str, Any] | None = None
        self.is_left_out = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        needs_the_whole_model(trainer, type(self).__name__)
        if stage == "fit" and self.every_n_validations and (reason := self._why_left_out(trainer)):
            self.is_left_out = True
            rank_zero_warn(f"the evaluation {self.protocol.name} is left out of this fit, {reason}")
        elif stage == "test" or (stage == "fit" and self.every_n_validations):  # a mistake is told before hours of work
            self.inception = find_weights(self.inception)
            self.check(self.reference(trainer)[0])
            self.training, self.why_not_compared = self._training(trainer)

    def _why_left_out(self, trainer: pl.Trainer) -> str | None:
        """What a fit goes on without its evaluation for."""
        data: CaptionedImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if is_declined(self.inception):
            return f"since ${VARIABLE} is none"
        if self.source is None and not data.has_pictures_at_hand:
            return (
                "whose data are streamed or codes alone: it counts the pictures of its reference, which its `source` "
                "may name"
            )
        return None

    def check(self, split: Dataset) -> None:
        """Raises a UserError if the protocol cannot be kept with these reference pictures and captions."""

    @property
    def state_key(self) -> str:
        return self._generate_state_key(protocol=self.protocol.name)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]

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
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if batch_idx > 0 or not self.every_n_validations or self.is_left_out:
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
        log_dir = Path(trainer.log_dir or ".")  # asks the other processes: all must
        split, origin, passed_over = self.reference(trainer)
        assert self.inception is not None
        inception = Inception(self.inception).to(pl_module.device)
        figures, show = self._figures(pl_module, split, origin, inception, processes)
        if not trainer.is_global_zero:
            return
        is_test = trainer.state.fn == "test"
        checkpoint = Path(trainer.ckpt_path) if trainer.ckpt_path and Path(trainer.ckpt_path).is_file() else None
        step = read_checkpoint(checkpoint)["global_step"] if is_test and checkpoint else trainer.global_step
        config = log_dir / "config.yaml"
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()} if is_test else {}
        result = {
            "kind": self.kind,
            "protocol": asdict(self.protocol),
            **figures,
            "reference": {**figures["reference"], "passed_over": passed_over},
            "reference_pictures_in_training_data": self._count_shared(zero_shot.choose_reference(split, self.protocol)),
            "measured_by_the_model": measured,
            "step": step,
            "checkpoint": {"file": checkpoint.name, "sha256": sha256(checkpoint)} if checkpoint else None,
            "inception": {"file": self.inception.name, "sha256": inception.sha256},
            "config": _settings(config) if config.is_file() else None,
            "commit": commit(),
            "machine": machine.describe(),
            "seconds": round(time.time() - begun, 1),
        }
        results_dir.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y-%m-%d_%H%M%S")
        file = results_dir / f"{stamp}_{self.protocol.name}_{self.kind}_{step}.json"
        write_json(file, result)
        print(markdown([(file.stem, *row) for row in rows(result)], cautions(result)))
        print(f"protocol: {json.dumps(result['protocol'], default=str)}\nwritten to {file}")
        if isinstance(trainer.logger, TensorBoardLogger):
            show(trainer.logger.experiment, step)

    def reference(self, trainer: pl.Trainer) -> tuple[Dataset, str, Counter[str]]:
        """The split of the reference, its pictures undecoded; what its data is called; and, by reason, its records
        without a picture or a caption, which are left out.
        """
        datamodule: CaptionedImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        source = self.source or datamodule.source
        splits = source.load(datamodule.image_size)
        name = self.protocol.drawing.split
        origin = str(getattr(source, "path", type(source).__name__))
        if name not in splits:
            raise UserError(
                f"the protocol {self.protocol.name} reads the split {name}, but {origin} has {', '.join(splits)}"
            )
        if not isinstance(splits[name], Dataset):
            raise UserError(
                f"the protocol {self.protocol.name} counts the pictures of its reference, but {origin} is streamed: "
                "name the evaluation's `source` as one that is not"
            )
        if "image" not in splits[name].column_names:
            raise UserError(
                f"the protocol {self.protocol.name} needs pictures, but {origin} has none: name theirs as the "
                "evaluation's `source`"
            )
        rows, passed_over = complete(splits[name], f"{origin}, split {name}")
        return rows.cast_column("image", EncodedImage(decode=False)), origin, passed_over

    def _training(self, trainer: pl.Trainer) -> tuple[Dataset | None, str | None]:
        """The pictures that were trained on, or why the reference's cannot be looked for among them."""
        datamodule: CaptionedImageDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if self.trained_on is not None:
            splits = self.trained_on.load(datamodule.image_size)
            if "train" not in splits:
                raise UserError(f"the evaluation's trained_on needs a split train, but it has {', '.join(splits)}")
            rows = splits["train"]
        elif trainer.state.fn == "fit":
            rows = datamodule.split("train")
        else:
            return None, "the evaluation's trained_on is not given"
        if not isinstance(rows, Dataset):
            return None, "the training data is streamed"
        if "image" not in rows.column_names:
            return None, "the training data has codes and no pictures"
        return rows, None

    def _count_shared(self, reference: Dataset) -> dict[str, Any]:
        """Reference pictures that were trained on; once, since all training pictures are read for it."""
        if self.training is None:
            return {"value": None, "refused": self.why_not_compared}
        if self.shared is None:
            count = zero_shot.shared_pictures(self.training, reference)
            self.shared = {"value": count, "of": len(reference)}
            if count:
                print(f"caution: {count} of the {len(reference)} reference pictures are in the training data too")
        return self.shared

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
    ) -> tuple[dict[str, Any], Callable[[SummaryWriter, int], None]]:
        """What is filed, in the first process, and what shows it in TensorBoard at a step."""
        raise NotImplementedError


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
        with progress("Drawing captions") as on_progress:
            zero_shot.draw_pictures(
                pipeline, prompts, drawing, folder, self.scorer, self.batch_size, on_progress, processes
            )
        with progress("Reading pictures") as on_progress:
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
        with progress("Reconstructing pictures") as on_progress:
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


def shown(rows: Dataset, place: int | None) -> Image.Image:
    """The middle square of a row's picture, undecoded; white where there is none, or none that can be read."""
    if place is not None:
        with contextlib.suppress(Unreadable):
            picture = read_picture(rows[place]["image"])
            return ImageOps.fit(picture, (min(picture.size),) * 2)
    return Image.new("RGB", (32, 32), "white")


def _settings(config: Path) -> dict[str, Any]:
    """A config as JSON has it; an infinite setting, which is no mistake there, by its name."""
    return json.loads(json.dumps(yaml.safe_load(config.read_text()), default=str), parse_constant=str)
