"""Base class of the callbacks that compare a model's images with real images, during `fit` and in `test`."""

import contextlib
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from datasets import Dataset
from datasets import Image as EncodedImage
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from pytorch_lightning import Callback
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from lightning_dalle.checkpoints import read_checkpoint
from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.images.decoding import UnreadableImage, decode_pil
from lightning_dalle.data.sources.captioned import drop_incomplete
from lightning_dalle.data.sources.source import Source, source_name
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation import zero_shot
from lightning_dalle.evaluation.features import DistributedContext, FeatureExtractor
from lightning_dalle.evaluation.inception import ENV_VAR, Inception, find_or_download_weights, is_disabled
from lightning_dalle.evaluation.protocol import Protocol, check_at_least
from lightning_dalle.evaluation.result_file import write_result
from lightning_dalle.files import read_yaml, sha256
from lightning_dalle.training.callbacks.loggers import log_image, log_scalars, run_folder, shows_images
from lightning_dalle.training.callbacks.requirements import require_data, require_model
from lightning_dalle.training.distributed.sharding import require_unsharded


class Figures(NamedTuple):
    """Figures of an evaluation, complete on rank 0 only."""

    record: dict[str, Any]
    """All figures and their protocol, for the result file."""
    scalars: dict[str, float]
    """Main figures by name, for the loggers."""
    images: Callable[[], dict[str, Image.Image | Figure]]
    """Function that draws images and plots by name, for the loggers."""


class Evaluation(Callback):
    """Base class of callbacks that compare a model's images with real images in `test` and, optionally, in `fit`.

    It finds the reference images, counts how many of them are training images, and writes the result file.

    Args:
        protocol: settings of the figures.
        every_n_validations: number of validations from one evaluation in `fit` to the next; 0 for `test` only. A
            ModelCheckpoint or EarlyStopping that monitors a figure needs 1.
        source: data with the reference images and captions; default: the data of the run.
        training_source: data that the checkpoint was trained on, in which `test` counts the reference images. `test`
            skips this count by default; `fit` uses its own training data.
        inception: Inception weights; default: $LIGHTNING_DALLE_INCEPTION, or torch hub's cache. If the variable is
            `none`, `fit` skips the evaluation.
        samples_dir: folder for generated images, with one subfolder for each combination of weights and settings.
        results_dir: folder for the results of `test`; `fit` writes its results into the folder of its logs.
        cache_dir: folder for a cache of Inception features.
        batch_size: number of images generated at once.
    """

    kind: str
    model: type[pl.LightningModule]
    """Kind of model that the callback evaluates."""

    def __init__(
        self,
        protocol: Protocol,
        every_n_validations: int = 0,
        source: Source | None = None,
        training_source: Source | None = None,
        inception: Path | None = None,
        samples_dir: Path = Path("evals/samples"),
        results_dir: Path = Path("evals/results"),
        cache_dir: Path = Path("~/.cache/lightning_dalle/features"),
        batch_size: int = 64,
    ) -> None:
        check_at_least(1, batch_size=batch_size)
        self.protocol, self.every_n_validations, self.source = protocol, every_n_validations, source
        self.training_source, self.inception = training_source, inception
        self.samples_dir, self.results_dir = samples_dir, results_dir
        self.cache_dir, self.batch_size = cache_dir.expanduser(), batch_size
        self.validations = 0
        self.training_overlap: dict[str, Any] | None = None
        self.is_skipped = False

    def evaluate(
        self, pl_module: pl.LightningModule, rows: Dataset, data_name: str, extractor: FeatureExtractor
    ) -> Figures:
        """Generate images and return their figures.

        Args:
            rows: dataset split with the reference images, undecoded.
            data_name: path or name of the dataset, for messages and results.
            extractor: extractor of the features for FID, on the model's device.
        """
        raise NotImplementedError

    def check(self, rows: Dataset) -> None:
        """Raise a UserError, before the training, if the protocol cannot be used with this dataset split."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        require_model(self, pl_module, self.model)
        require_unsharded(trainer, type(self).__name__)
        if stage == "fit" and not self.every_n_validations:
            return
        if stage == "fit" and (reason := self._why_skipped(trainer)):
            self.is_skipped = True
            rank_zero_warn(f"this fit skips the evaluation {self.protocol.name}, since {reason}")
        elif stage in ("fit", "test"):
            self.inception = find_or_download_weights(self.inception)
            self.check(self.reference(trainer, pl_module)[0])
            self.training_rows, self.why_no_training_rows = self._training_rows(trainer, pl_module)

    def _why_skipped(self, trainer: pl.Trainer) -> str | None:
        data = None if self.source is not None else require_data(self, trainer)
        if is_disabled(self.inception):
            return f"${ENV_VAR} is none"
        if data is not None and not data.has_image_rows:
            return "the training data is streamed or has codes only: give the evaluation a `source` with images"
        return None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(protocol=self.protocol.name)

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Evaluate after the first validation batch: only then is the model certain to have its averaged weights."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if batch_idx > 0 or not self.every_n_validations or self.is_skipped:
            return
        self.validations += 1
        if self.validations % self.every_n_validations == 0:
            scalars = trainer.strategy.broadcast(self._run(trainer, pl_module))
            pl_module.log_dict(scalars, on_epoch=True, batch_size=1)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate at the end of `test`, so that the result includes the metrics that the test steps logged."""
        self._run(trainer, pl_module)

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Evaluate the model, write the result file, log the images, and return the scalars, empty on other ranks."""
        begun = time.time()
        context = DistributedContext(trainer.global_rank, trainer.world_size, trainer.strategy.barrier)
        rows, data_name, skipped_records = self.reference(trainer, pl_module)
        assert self.inception is not None
        inception = Inception(self.inception).to(pl_module.device)
        extractor = FeatureExtractor(inception, self.protocol, self.cache_dir, context=context)
        figures, scalars, images = self.evaluate(pl_module, rows, data_name, extractor)
        if not trainer.is_global_zero:
            return {}
        is_test, checkpoint, step = trainer.state.fn == "test", _checkpoint_file(trainer), trainer.global_step
        run = run_folder(trainer)
        results_dir = self.results_dir if is_test else (run or Path(trainer.default_root_dir)) / "evaluation"
        if is_test and checkpoint is not None:
            step = read_checkpoint(checkpoint).get("global_step", 0)
        result = {
            "kind": self.kind,
            "protocol": asdict(self.protocol),
            **figures,
            "reference": {**figures["reference"], "skipped_records": skipped_records},
            "reference_images_in_training_data": self._count_training_overlap(rows),
            "model_metrics": {k: float(v) for k, v in trainer.callback_metrics.items()} if is_test else {},
            "step": step,
            "checkpoint": {"file": checkpoint.name, "sha256": sha256(checkpoint)} if checkpoint else None,
            "inception": {"file": self.inception.name, "sha256": inception.sha256},
            "config": _read_config(run / "config.yaml") if run and (run / "config.yaml").is_file() else None,
        }
        write_result(results_dir, f"{self.protocol.name}_{self.kind}_{step}", result, begun)
        if shows_images(trainer):
            for name, image in images().items():
                log_image(trainer, name, image, step)
        if is_test:
            log_scalars(trainer, scalars, step)
        return scalars

    def reference(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[Dataset, str, Counter[str]]:
        """Return the reference split with undecoded images, the dataset's path or name, and skipped records by reason.

        Raises:
            UserError: if the dataset lacks the protocol's split, has no images or is streamed.
        """
        source = self.source or require_data(self, trainer).source
        splits = source.load(_image_size(trainer, pl_module))
        name, protocol = self.protocol.generation.split, f"the protocol {self.protocol.name}"
        data_name = source_name(source)
        if name not in splits:
            found = ", ".join(splits)
            raise UserError(f"{protocol} uses the split {name}, but {data_name} has {found}: set generation.split")
        if not isinstance(splits[name], Dataset):
            raise UserError(f"{protocol} cannot use {data_name}, which is streamed: set another `source`")
        if "image" not in splits[name].column_names:
            raise UserError(f"{protocol} needs images, but {data_name} has none: set a `source` that has images")
        rows, skipped_records = drop_incomplete(splits[name], f"{data_name}, split {name}")
        return rows.cast_column("image", EncodedImage(decode=False)), data_name, skipped_records

    def _training_rows(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[Dataset | None, str | None]:
        """Return the training data, or None and the reason why reference images cannot be counted in it."""
        if self.training_source is not None:
            splits = self.training_source.load(_image_size(trainer, pl_module))
            if "train" not in splits:
                found = ", ".join(splits)
                raise UserError(f"training_source of the evaluation needs a split train, but has {found}: correct it")
            rows = splits["train"]
        elif trainer.state.fn == "fit" and isinstance(trainer.datamodule, CaptionedImageDataModule):  # type: ignore[attr-defined]
            rows = require_data(self, trainer).split("train")
        else:
            return None, "the evaluation's training_source is not given"
        if not isinstance(rows, Dataset):
            return None, "the training data is streamed"
        if "image" not in rows.column_names:
            return None, "the training data has codes and no images"
        return rows, None

    def _count_training_overlap(self, rows: Dataset) -> dict[str, Any]:
        """Return the number of reference images in the training data, counted once since this reads all images."""
        if self.training_rows is None:
            return {"value": None, "reason": self.why_no_training_rows}
        if self.training_overlap is None:
            reference = zero_shot.choose_reference(rows, self.protocol)
            count = zero_shot.count_shared_images(self.training_rows, reference)
            self.training_overlap = {"value": count, "of": len(reference)}
            if count:
                print(f"warning: {count} of the {len(reference)} reference images are in the training data too")
        return self.training_overlap

    def samples_folder(self, *depends_on: object) -> Path:
        """Return the folder for images; its name has a hash of the values that the images depend on."""
        digest = hashlib.sha256(json.dumps(depends_on, default=str, sort_keys=True).encode()).hexdigest()[:12]
        return self.samples_dir / f"{self.protocol.name}-{digest}"


def reference_image(rows: Dataset, index: int | None) -> Image.Image:
    """Return the center square of a row's image; a white image if the index is None or the image is unreadable."""
    if index is not None:
        with contextlib.suppress(UnreadableImage):
            image = decode_pil(rows[index]["image"])
            return ImageOps.fit(image, (min(image.size),) * 2)
    return Image.new("RGB", (32, 32), "white")


def _image_size(trainer: pl.Trainer, pl_module: Any) -> int:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, CaptionedImageDataModule):
        return data.image_size
    pl_module.configure_model()  # otherwise a DALL-E has no dVAE before its `setup`
    return pl_module.dvae.config.image_size


def _checkpoint_file(trainer: pl.Trainer) -> Path | None:
    return Path(trainer.ckpt_path) if trainer.ckpt_path and Path(trainer.ckpt_path).is_file() else None


def _read_config(config: Path) -> dict[str, Any]:
    """Read a YAML config as values that JSON can represent: infinities and NaN become strings."""
    return json.loads(json.dumps(read_yaml(config), default=str), parse_constant=str)
