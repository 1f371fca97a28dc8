"""DataSummary in TensorBoard."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from bad_input import GOOD, noise_image
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, List, Value
from datasets import Image as EncodedImage
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.filters.rules import TooLong
from lightning_dalle.data.loading.examples import Batch
from lightning_dalle.tokenizer import CaptionTokenizer
from lightning_dalle.training.callbacks.visualization import DataSummary


class Noise:
    """Source of five records, one with a caption that is too long and one without an image."""

    def __init__(self, streamed: bool) -> None:
        self.streamed = streamed

    def load(self, image_size: int) -> DatasetDict | IterableDatasetDict:
        records = [
            {"image": {"bytes": noise_image(), "path": None}, "captions": [GOOD.decode()], "id": str(i)}
            for i in range(5)
        ]
        records[1]["captions"] = ["a long caption " * 9]
        records[3]["image"] = {"bytes": b"", "path": None}
        features = Features(image=EncodedImage(decode=False), captions=List(Value("string")), id=Value("string"))
        rows = Dataset.from_list(records, features=features)
        return IterableDatasetDict({"train": rows.to_iterable_dataset()}) if self.streamed else DatasetDict(train=rows)


class OneNumber(pl.LightningModule):
    """Model with a single parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.number**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_data_summary_shows_the_uint8_images_of_a_users_loader_and_ignores_other_batches(tmp_path: Path) -> None:
    tokenizer = CaptionTokenizer.train(["a cat"], vocab_size=256, text_len=6)
    tokens = torch.tensor([tokenizer.pad(tokenizer.encode("a cat"))[0]])
    images = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    own = Batch(images, tokens, torch.zeros(1, dtype=torch.bool), ["a cat"], ["0"], tokenizer=tokenizer)
    for batch, shown in ((own, ["data/batch"]), (images, [])):
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=1, callbacks=[DataSummary()], logger=TensorBoardLogger(tmp_path),
            enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(OneNumber(), DataLoader([batch], batch_size=None))  # type: ignore[arg-type]
        events = EventAccumulator(trainer.logger.log_dir).Reload()
        assert events.Tags()["images"] == shown


@pytest.mark.parametrize("streamed", [False, True])
def test_data_summary_logs_batch_caption_lengths_and_rejections(streamed: bool, tmp_path: Path) -> None:
    data = CaptionedImageDataModule(
        Noise(streamed), image_size=16, batch_size=1, text_len=12, vocab_size=300, epoch_length=3, shuffle_buffer=1,
        bpe_dropout=0.0, filters=[TooLong(max_characters=40)],
    )  # fmt: skip
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=3, callbacks=[DataSummary()], logger=TensorBoardLogger(tmp_path),
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(OneNumber(), data)
    events = EventAccumulator(trainer.logger.log_dir, size_guidance={"tensors": 0}).Reload()
    assert events.Tags()["images"] == ["data/batch"]
    [lengths] = events.Histograms("data/caption_tokens")
    length = len(data.tokenizer.encode(GOOD.decode()))
    assert (lengths.histogram_value.num, lengths.histogram_value.max) == (3, length)
    rejected = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"] if "rejected" in tag}
    assert rejected == {"data/rejected/caption too long": 1, "data/rejected/empty image file": 1}
