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
import yaml
from datasets import Dataset
from datasets import Image as EncodedImage
from PIL import Image, ImageOps
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.tensorboard import SummaryWriter

from lightning_dalle.checkpoints import read_checkpoint
from lightning_dalle.data.datamodule import CaptionedImageDataModule, Source
from lightning_dalle.data.images.decoding import Unreadable, read_picture
from lightning_dalle.data.sources.captioned import complete
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation import zero_shot
from lightning_dalle.evaluation.features import Processes
from lightning_dalle.evaluation.inception import VARIABLE, Inception, find_weights, is_declined
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.files import sha256, write_json
from lightning_dalle.hardware import describe_hardware
from lightning_dalle.provenance import commit
from lightning_dalle.results_table import cautions, markdown, rows
from lightning_dalle.training.distributed.sharding import needs_the_whole_model


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
            "machine": describe_hardware(),
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
