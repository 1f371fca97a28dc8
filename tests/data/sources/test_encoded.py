"""Shards of codes: whole, in order, and known by what they were made by."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from lightning_dalle.data.loading.examples import Preparation
from lightning_dalle.data.loading.samplers import Draw
from lightning_dalle.data.sources.encoded import (
    EncodedCaptions,
    EncodedPictures,
    Encoding,
    code_type,
    read_encoding,
    write_shard,
)  # fmt: skip
from lightning_dalle.errors import UserError
from lightning_dalle.tokenizer import CaptionTokenizer

ENCODING = Encoding(
    dvae="d" * 64, grid=2, codebook_size=600, image_size=8, augmentation="None", crops={"train": 3, "val": 1},
    records={"train": 7, "val": 2}, shard_size=3, source="Cats()", filters="None", seed=0,
    attribution="Made from cats.", made_on={},
)  # fmt: skip


def rows(split: str) -> Dataset:
    ids = [f"{split} {i}" for i in range(ENCODING.records[split])]
    return Dataset.from_dict({"image": [None] * len(ids), "captions": [[i, "a cat"] for i in ids], "id": ids})


def code(split: str, crop: int, record: int) -> np.ndarray:
    """Of a picture that is told by its codes."""
    return np.array([[{"train": 0, "val": 1}[split], crop], [record, 599]], dtype=np.uint16)


def write(folder: Path, encoding: Encoding = ENCODING) -> None:
    for shard in encoding.shards:
        codes = [code(shard.split, *draw) for draw in shard.draws(encoding.crops[shard.split])]
        write_shard(folder, shard, encoding, rows(shard.split), np.stack(codes))


def test_shards_are_contiguous_blocks() -> None:
    assert [(shard.name, list(shard.records)) for shard in ENCODING.shards] == [
        ("train-00000-of-00003.parquet", [0, 1, 2]),
        ("train-00001-of-00003.parquet", [3, 4, 5]),
        ("train-00002-of-00003.parquet", [6]),
        ("val-00000-of-00001.parquet", [0, 1]),
    ]
    assert list(ENCODING.shards[1].draws(2))[:3] == [Draw(0, 3), Draw(1, 3), Draw(0, 4)]


def test_what_is_written_is_read_in_order_with_the_epoch_s_crop(tmp_path: Path) -> None:
    write(tmp_path)
    splits = EncodedPictures(path=str(tmp_path)).load(8)
    tokenizer = CaptionTokenizer.train(["a cat"], vocab_size=256, text_len=6)
    for split, crops in ENCODING.crops.items():
        data = EncodedCaptions(splits[split], Preparation(8, tokenizer, None, 0.0, seed=0))
        for draw in (Draw(epoch, record) for epoch in range(5) for record in range(len(data))):
            codes, tokens, is_cut, caption, name = data[draw]
            assert codes.tolist() == code(split, draw.epoch % crops, draw.record).tolist()
            assert (codes.dtype, len(tokens), name) == (torch.int64, 6, f"{split} {draw.record}")
            assert caption in (name, "a cat")
            assert is_cut == (len(caption) > 5)


def test_a_code_takes_no_more_room_than_it_must(tmp_path: Path) -> None:
    assert [code_type(size) for size in (256, 257, 8192, 65536)] == ["uint8", "uint16", "uint16", "uint16"]
    write(tmp_path)
    features = EncodedPictures(path=str(tmp_path)).load(8)["train"].features["codes"]
    assert (features.feature.length, features.feature.feature.dtype) == (4, "uint16")


def test_a_shard_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(table: pa.Table, file: Path) -> None:
        file.write_bytes(b"PAR1")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert not list(tmp_path.glob("*.parquet"))
    with pytest.raises(UserError, match="there are no shards of codes in"):
        EncodedPictures(path=str(tmp_path)).load(8)


def test_shards_that_are_missing_foreign_or_of_another_run_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    source = EncodedPictures(path=str(tmp_path))
    lost = tmp_path / "train-00001-of-00003.parquet"
    lost.unlink()
    with pytest.raises(UserError, match="has 3 of 4 shards of codes"):
        source.load(8)
    other = replace(ENCODING, seed=1)
    write_shard(tmp_path, other.shards[1], other, rows("train"), np.zeros((9, 2, 2), np.uint16))
    with pytest.raises(UserError, match="was encoded with seed=1, but seed=0 is asked for"):
        source.load(8)
    pq.write_table(pa.table({"codes": [1]}), lost)
    with pytest.raises(UserError, match=r"train-00001-of-00003.parquet is no shard of codes"):
        source.load(8)
    assert read_encoding(tmp_path / "val-00000-of-00001.parquet") == replace(ENCODING, made_on={"torch": "another"})


def test_a_dvae_with_another_grid_codebook_or_weights_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    source = EncodedPictures(path=str(tmp_path))
    source.check("d" * 64, 2, 600, Path("a.ckpt"))
    for values, sentence in (
        (("d" * 64, 4, 600), "the dVAE in a.ckpt has grid=4, but the codes in .* have 2"),
        (("d" * 64, 2, 512), "the dVAE in a.ckpt has codebook_size=512, but the codes in .* have 600"),
        (
            ("e" * 64, 2, 600),
            "a.ckpt has the weights eeeeeeeeeeeeeeee, but .* were made by the weights dddddddddddddddd",
        ),
    ):
        with pytest.raises(UserError, match=sentence):
            source.check(*values, Path("a.ckpt"))
