"""Batches, their order and their randomness."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import DatasetDict
from PIL import Image

from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.images.transforms import to_image
from lightning_dalle.data.loading.samplers import Draw, Draws, Once
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
    assert batch.is_cut.shape == (8,)


def test_validation_captions_are_those_of_the_pictures(data: CaptionedImageDataModule) -> None:
    assert data.splits is not None
    batch = next(iter(data.val_dataloader()))
    decoded = [data.tokenizer.decode(ids) for ids in batch.text_tokens.tolist()]
    assert decoded == [captions[0] for captions in data.splits["val"]["captions"][:8]]


def test_an_epoch_is_every_record_once_in_another_order(data: CaptionedImageDataModule) -> None:
    sampler = Draws(range(100), num_replicas=1, rank=0, shuffle=True, seed=3)  # type: ignore[arg-type]
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(draw.record for draw in first) == sorted(draw.record for draw in second) == list(range(100))
    assert [draw.record for draw in first] != [draw.record for draw in second]
    assert {draw.epoch for draw in second} == {1}


def test_processes_share_an_epoch_without_overlap() -> None:
    parts = [
        [draw.record for draw in Draws(range(100), num_replicas=4, rank=rank, shuffle=True)]  # type: ignore[arg-type]
        for rank in range(4)
    ]
    assert sorted(index for part in parts for index in part) == list(range(100))


def test_a_loader_goes_on_in_the_middle_of_an_epoch(data: CaptionedImageDataModule) -> None:
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


def test_bpe_dropout_is_for_training_only_and_the_same_for_the_same_draw(data: CaptionedImageDataModule) -> None:
    train, val = data.dataset("train", bpe_dropout=0.5), data.dataset("train")
    draws = [(epoch, index) for epoch in range(3) for index in range(20)]
    dropped = [train[Draw(*draw)][1] for draw in draws]
    assert dropped == [train[Draw(*draw)][1] for draw in draws]
    assert dropped[:20] != dropped[20:40]
    whole = [val[Draw(*draw)][1] for draw in draws]
    assert whole[:20] == whole[20:40]


def test_captions_that_are_cut_are_counted() -> None:
    short = datamodule(text_len=3)
    with pytest.warns(UserWarning, match="cut to text_len=3"):
        batch = next(iter(short.train_dataloader()))
    assert batch.is_cut.any()
    assert batch.text_tokens.shape == (8, 3)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match="records, less than one batch of batch_size=9999"):
        datamodule(batch_size=9999)


def test_a_batch_larger_than_a_process_s_share_is_refused() -> None:
    data = CaptionedImageDataModule(OpenMoji(), image_size=32, batch_size=1500, text_len=24, vocab_size=512)
    data.setup("fit")
    data.trainer = SimpleNamespace(global_rank=0, world_size=3)  # type: ignore[assignment]
    with pytest.raises(UserError, match="records, less than one batch of batch_size=1500 for each of 3 processes"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("num_workers", -1), ("text_len", 0), ("image_size", 0)]
)
def test_what_is_out_of_range_is_named(name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"the data's {name} is {value}, but must be at least"):
        datamodule(**{name: value})


def test_a_resumed_run_reads_captions_as_the_run_before_did(tmp_path: Path) -> None:
    before = CaptionTokenizer.train(["other captions than these"], vocab_size=512, text_len=24)
    data = datamodule()
    data.load_state_dict({"tokenizer": before.to_json()})
    assert data.tokenizer.to_json() == before.to_json()
    with pytest.raises(UserError, match="captions have vocab_size=400, text_len=24, but this run's vocab_size=512"):
        data.load_state_dict(datamodule(vocab_size=400).state_dict())
    (tmp_path / "tokenizer.json").write_text(datamodule().tokenizer.to_json())
    with pytest.raises(UserError, match=r"another tokenizer than that of .*tokenizer\.json"):
        datamodule(tokenizer_file=tmp_path / "tokenizer.json").load_state_dict({"tokenizer": before.to_json()})


def test_several_captions_are_drawn_by_epoch() -> None:
    class Two:
        def load(self, image_size: int) -> DatasetDict:
            splits = OpenMoji().load(image_size)
            return DatasetDict(
                {name: split.map(lambda row: {"captions": ["a", "b"]}) for name, split in splits.items()}
            )

    data = CaptionedImageDataModule(Two(), image_size=32, batch_size=8, text_len=4, vocab_size=300)
    data.setup("fit")
    train = data.dataset("train")
    seen = {(epoch, tuple(train[Draw(epoch, index)][1])) for epoch in range(4) for index in range(8)}
    assert len({tokens for _, tokens in seen}) == 2


def test_an_evaluation_reads_every_record_once_however_many_processes_share_it() -> None:
    parts = [Once(range(7), num_replicas=3, rank=rank, shuffle=False) for rank in range(3)]  # type: ignore[arg-type]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted(draw.record for part in parts for draw in part) == list(range(7))


def test_a_picture_that_cannot_be_read_is_named(data: CaptionedImageDataModule) -> None:
    from datasets import Dataset, Features, Image, List, Value

    rows = Dataset.from_list(
        [{"image": {"bytes": b"no picture", "path": None}, "captions": ["a cat"]}],
        features=Features(image=Image(decode=False), captions=List(Value("string"))),
    )
    broken = datamodule()
    assert broken.splits is not None
    broken.splits["val"] = rows
    with pytest.raises(UserError, match="the picture of record 0 cannot be read"):
        broken.dataset("val")[Draw(0, 0)]


def test_look_alikes_need_rows_of_one_source() -> None:
    mixed = Mixture(sources=[OpenMoji(), OpenMoji()], weights=[1.0, 1.0])
    data = CaptionedImageDataModule(mixed, image_size=32, batch_size=8, text_len=8, vocab_size=300, look_alikes=4)
    with pytest.raises(UserError, match=r"look_alikes=4 needs the captions of all rows of one source, but .* mixture"):
        data.setup("fit")
    with pytest.raises(UserError, match="look_alikes is -1, but must be at least 0"):
        datamodule(look_alikes=-1)


def test_a_transparent_picture_is_on_white() -> None:
    assert to_image(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), 8).min() == 1
