"""Batches of the datamodule, their order and their randomness."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, List, Value
from datasets import Image as EncodedImage
from PIL import Image

from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.filters.rules import TooLong
from lightning_dalle.data.images.transforms import to_image
from lightning_dalle.data.loading.samplers import EvalSampler, ResumableSampler, SampleIndex
from lightning_dalle.data.sources.mixture import Mixture
from lightning_dalle.data.sources.openmoji import OpenMoji
from lightning_dalle.errors import UserError
from lightning_dalle.tokenizer import CaptionTokenizer


def datamodule(**options: object) -> CaptionedImageDataModule:
    values = {"image_size": 32, "batch_size": 8, "text_len": 24, "vocab_size": 512, **options}
    data = CaptionedImageDataModule(OpenMoji(), **values)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def data() -> CaptionedImageDataModule:
    return datamodule()


def test_a_batch_is_images_and_padded_tokens(data: CaptionedImageDataModule) -> None:
    loaded = next(iter(data.train_dataloader()))
    assert loaded.images.dtype == torch.uint8, "a float takes four times as long to get to a device"
    batch = data.on_after_batch_transfer(loaded, 0)
    assert batch.images.shape == (8, 3, 32, 32)
    assert batch.images.is_contiguous()
    assert 0 <= batch.images.min() < batch.images.max() <= 1
    assert batch.text_tokens.shape == (8, 24)
    assert batch.text_tokens.max() < 512 + 24
    assert batch.is_truncated.shape == (8,)


def test_validation_captions_belong_to_their_images(data: CaptionedImageDataModule) -> None:
    assert data.splits is not None
    batch = next(iter(data.val_dataloader()))
    decoded = [data.tokenizer.decode(ids) for ids in batch.text_tokens.tolist()]
    assert decoded == [captions[0] for captions in data.splits["val"]["captions"][:8]]


def test_every_epoch_has_every_record_once_in_another_order(data: CaptionedImageDataModule) -> None:
    sampler = ResumableSampler(range(100), num_replicas=1, rank=0, shuffle=True, seed=3)  # type: ignore[arg-type]
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(index.record for index in first) == sorted(index.record for index in second) == list(range(100))
    assert [index.record for index in first] != [index.record for index in second]
    assert {index.epoch for index in second} == {1}


def test_ranks_share_an_epoch_without_overlap() -> None:
    parts = [
        [index.record for index in ResumableSampler(range(100), num_replicas=4, rank=rank, shuffle=True)]  # type: ignore[arg-type]
        for rank in range(4)
    ]
    assert sorted(index for part in parts for index in part) == list(range(100))


def test_a_loader_resumes_in_the_middle_of_an_epoch(data: CaptionedImageDataModule) -> None:
    loader = data.train_dataloader()
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()  # type: ignore[attr-defined]
    expected = [next(iterator) for _ in range(3)]
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)  # type: ignore[attr-defined]
    for batch, wanted in zip(resumed, expected, strict=False):
        assert torch.equal(batch.images, wanted.images)
        assert torch.equal(batch.text_tokens, wanted.text_tokens)


def test_bpe_dropout_is_for_training_only_and_repeatable(data: CaptionedImageDataModule) -> None:
    train, val = data.dataset("train", bpe_dropout=0.5), data.dataset("train")
    indices = [SampleIndex(epoch, record) for epoch in range(3) for record in range(20)]
    dropped = [train[index][1] for index in indices]
    assert dropped == [train[index][1] for index in indices]
    assert dropped[:20] != dropped[20:40]
    whole = [val[index][1] for index in indices]
    assert whole[:20] == whole[20:40]


def test_truncated_captions_are_counted() -> None:
    short = datamodule(text_len=3)
    with pytest.warns(UserWarning, match="truncated to data.text_len=3"):
        batch = next(iter(short.train_dataloader()))
    assert batch.is_truncated.any()
    assert batch.text_tokens.shape == (8, 3)


def streamed(**options: object) -> CaptionedImageDataModule:
    class Stream:
        def load(self, image_size: int) -> IterableDatasetDict:
            rows = Dataset.from_dict({"image": [None], "captions": [["a cat"]]})
            return IterableDatasetDict({"train": rows.to_iterable_dataset()})

    values = {"image_size": 8, "batch_size": 4, "text_len": 4, "vocab_size": 260, **options}
    data = CaptionedImageDataModule(Stream(), **values)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def test_an_epoch_of_streamed_data_has_at_least_one_batch_per_worker() -> None:
    with pytest.raises(UserError, match=r"epoch_length is 7, but batch_size 4 for 2 workers in 1 .* needs at least 8"):
        streamed(epoch_length=7, num_workers=2).train_dataloader()


def test_a_missing_split_is_named() -> None:
    with pytest.raises(UserError, match=r"needs a split val, but data\.source has only train: add it"):
        streamed().val_dataloader()


def test_rows_that_are_all_rejected_are_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"reject all \d+ records of the split .*: \d+ caption too long \(such as .*; loosen data\.filters",
    ):
        datamodule(filters=[TooLong(max_characters=0)])


def test_a_tokenizer_file_is_readable_and_has_the_vocabulary_size(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read a tokenizer from .*none\.json .*; correct data\.tokenizer_file"):
        _ = streamed(tokenizer_file=tmp_path / "none.json").tokenizer
    file = tmp_path / "tokenizer.json"
    file.write_text(CaptionTokenizer.train(["a cat"], vocab_size=257, text_len=8).to_json())
    with pytest.raises(
        UserError, match=r"has vocab_size=257, but data\.vocab_size is 260; set data\.vocab_size to 257"
    ):
        _ = streamed(tokenizer_file=file).tokenizer
    assert streamed(tokenizer_file=file, vocab_size=257).tokenizer.text_len == 4


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match=r"records, fewer than one batch of batch_size=9999; reduce data\.batch_size"):
        datamodule(batch_size=9999)


def test_a_batch_larger_than_the_records_of_a_rank_is_refused() -> None:
    data = CaptionedImageDataModule(OpenMoji(), image_size=32, batch_size=1500, text_len=24, vocab_size=512)
    data.setup("fit")
    data.trainer = SimpleNamespace(global_rank=0, world_size=3)  # type: ignore[assignment]
    with pytest.raises(UserError, match="records, fewer than one batch of batch_size=1500 for each of 3 processes"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("num_workers", -1), ("text_len", 0), ("image_size", 0), ("hard_negative_group_size", -1)],
)
def test_an_option_out_of_range_is_refused(name: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"data\.{name} is {value}, but must be at least"):
        datamodule(**{name: value})


def test_a_resumed_run_uses_the_tokenizer_of_the_checkpoint(tmp_path: Path) -> None:
    before = CaptionTokenizer.train(["other captions than these"], vocab_size=512, text_len=24)
    data = datamodule()
    data.load_state_dict({"tokenizer": before.to_json()})
    assert data.tokenizer.to_json() == before.to_json()
    with pytest.raises(
        UserError, match=r"vocab_size is 512 \(in the checkpoint 400\) and .*; set both as in the checkpoint"
    ):
        data.load_state_dict(datamodule(vocab_size=400).state_dict())
    (tmp_path / "tokenizer.json").write_text(datamodule().tokenizer.to_json())
    with pytest.raises(UserError, match=r"another tokenizer than .*tokenizer\.json; unset data.tokenizer_file"):
        datamodule(tokenizer_file=tmp_path / "tokenizer.json").load_state_dict({"tokenizer": before.to_json()})


def test_the_caption_of_a_record_changes_with_the_epoch() -> None:
    class Two:
        def load(self, image_size: int) -> DatasetDict:
            splits = OpenMoji().load(image_size)
            return DatasetDict(
                {name: split.map(lambda row: {"captions": ["a", "b"]}) for name, split in splits.items()}
            )

    data = CaptionedImageDataModule(Two(), image_size=32, batch_size=8, text_len=4, vocab_size=300)
    data.setup("fit")
    train = data.dataset("train")
    seen = {(epoch, tuple(train[SampleIndex(epoch, index)][1])) for epoch in range(4) for index in range(8)}
    assert len({tokens for _, tokens in seen}) == 2


def test_evaluation_reads_every_record_once_over_all_ranks() -> None:
    parts = [EvalSampler(range(7), num_replicas=3, rank=rank, shuffle=False) for rank in range(3)]  # type: ignore[arg-type]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(draw.record for part in parts for draw in part) == list(range(7))


def test_an_image_that_cannot_be_decoded_is_named(data: CaptionedImageDataModule) -> None:
    rows = Dataset.from_list(
        [{"image": {"bytes": b"not an image", "path": None}, "captions": ["a cat"]}],
        features=Features(image=EncodedImage(decode=False), captions=List(Value("string"))),
    )
    broken = datamodule()
    assert broken.splits is not None
    broken.splits["val"] = rows
    with pytest.raises(UserError, match=r"cannot decode the image of record 0: .*; remove the record"):
        broken.dataset("val")[SampleIndex(0, 0)]


def test_hard_negatives_need_rows_of_one_source() -> None:
    mixed = Mixture(sources=[OpenMoji(), OpenMoji()], weights=[1.0, 1.0])
    data = CaptionedImageDataModule(
        mixed, image_size=32, batch_size=8, text_len=8, vocab_size=300, hard_negative_group_size=4
    )
    with pytest.raises(
        UserError, match=r"hard_negative_group_size=4 needs rows on disk of a single source, .* mixture; set .* to 0"
    ):
        data.setup("fit")


def test_a_transparent_image_is_composited_on_white() -> None:
    assert to_image(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), 8).min() == 1
