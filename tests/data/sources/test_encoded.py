"""Shards of codes: atomic writes, order, and checks of how they were made."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from lightning_dalle.data.loading.examples import EncodedDataset, ExampleTransform
from lightning_dalle.data.loading.samplers import SampleIndex
from lightning_dalle.data.sources.encoded import (
    EncodedImages,
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
    """Return codes that identify split, crop and record."""
    return np.array([[{"train": 0, "val": 1}[split], crop], [record, 599]], dtype=np.uint16)


def write(folder: Path, encoding: Encoding = ENCODING) -> None:
    for shard in encoding.shards:
        codes = [code(shard.split, *index) for index in shard.sample_indices(encoding.crops[shard.split])]
        write_shard(folder, shard, encoding, rows(shard.split), np.stack(codes))


def test_shards_are_contiguous_blocks() -> None:
    assert [(shard.name, list(shard.records)) for shard in ENCODING.shards] == [
        ("train-00000-of-00003.parquet", [0, 1, 2]),
        ("train-00001-of-00003.parquet", [3, 4, 5]),
        ("train-00002-of-00003.parquet", [6]),
        ("val-00000-of-00001.parquet", [0, 1]),
    ]
    assert list(ENCODING.shards[1].sample_indices(2))[:3] == [SampleIndex(0, 3), SampleIndex(1, 3), SampleIndex(0, 4)]


def test_codes_are_read_in_order_with_the_crop_of_the_epoch(tmp_path: Path) -> None:
    write(tmp_path)
    splits = EncodedImages(path=str(tmp_path)).load(8)
    tokenizer = CaptionTokenizer.train(["a cat"], vocab_size=256, text_len=6)
    for split, crops in ENCODING.crops.items():
        data = EncodedDataset(splits[split], ExampleTransform(8, tokenizer, None, 0.0, seed=0))
        for index in (SampleIndex(epoch, record) for epoch in range(5) for record in range(len(data))):
            codes, tokens, is_truncated, caption, name = data[index]
            assert codes.tolist() == code(split, index.epoch % crops, index.record).tolist()
            assert (codes.dtype, len(tokens), name) == (torch.int64, 6, f"{split} {index.record}")
            assert caption in (name, "a cat")
            assert is_truncated == (len(caption) > 5)


def test_codes_have_the_smallest_type(tmp_path: Path) -> None:
    assert [code_type(size) for size in (256, 257, 8192, 65536)] == ["uint8", "uint16", "uint16", "uint16"]
    write(tmp_path)
    features = EncodedImages(path=str(tmp_path)).load(8)["train"].features["codes"]
    assert (features.feature.length, features.feature.feature.dtype) == (4, "uint16")


def test_shards_are_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(table: pa.Table, file: Path) -> None:
        file.write_bytes(b"PAR1")
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert not list(tmp_path.glob("*.parquet"))
    with pytest.raises(UserError, match=f"{tmp_path} contains no shards of codes; write them with `predict`"):
        EncodedImages(path=str(tmp_path)).load(8)


def test_missing_and_foreign_shards_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    source = EncodedImages(path=str(tmp_path))
    lost = tmp_path / "train-00001-of-00003.parquet"
    lost.unlink()
    with pytest.raises(UserError, match="has 3 of 4 shards of codes; run the same `predict` again"):
        source.load(8)
    other = replace(ENCODING, seed=1)
    write_shard(tmp_path, other.shards[1], other, rows("train"), np.zeros((9, 2, 2), np.uint16))
    with pytest.raises(UserError, match="was encoded with seed=1, but seed=0 is expected; remove the file"):
        source.load(8)
    pq.write_table(pa.table({"codes": [1]}), lost)
    with pytest.raises(UserError, match=r"train-00001-of-00003.parquet is not a shard of codes .*; remove it"):
        source.load(8)
    assert read_encoding(tmp_path / "val-00000-of-00001.parquet") == replace(ENCODING, made_on={"torch": "another"})


def test_a_dvae_with_another_grid_codebook_or_weights_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    source = EncodedImages(path=str(tmp_path))
    source.check_dvae("d" * 64, 2, 600, Path("a.ckpt"))
    for values, codes, dvae in (
        (("d" * 64, 4, 600), "grid=2", "grid=4"),
        (("d" * 64, 2, 512), "codebook_size=600", "codebook_size=512"),
        (("e" * 64, 2, 600), "dvae=dddddddd", "dvae=eeeeeeee"),
    ):
        sentence = f"{tmp_path} were encoded with {codes}.*, but the dVAE in a.ckpt has {dvae}.*: choose the dVAE of"
        with pytest.raises(UserError, match=sentence):
            source.check_dvae(*values, Path("a.ckpt"))
