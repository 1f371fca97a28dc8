"""Tokenizer of a run: read from a file, or learned from training captions, of which this module reads streamed ones."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import IterableDataset

from lightning_dalle.data.filters.pipeline import FilterPipeline, Rejection
from lightning_dalle.data.loading.streaming import ShardReader
from lightning_dalle.errors import UserError
from lightning_dalle.tokenizer import CaptionTokenizer

MAX_STREAMED_CAPTIONS = 50_000
"""Number of streamed captions to learn from. Most formats store them with the images, which are then read too."""


def read_tokenizer(path: Path, vocab_size: int, text_len: int) -> CaptionTokenizer:
    """Read a tokenizer that `CaptionTokenizer.to_json` wrote, and set its `text_len`.

    Raises:
        UserError: if the file cannot be read, or has another `vocab_size`.
    """
    try:
        found = CaptionTokenizer.from_json(path.read_text())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read a tokenizer from {path} ({error!r}); check data.tokenizer_file") from error
    if found.vocab_size != vocab_size:
        raise UserError(
            f"the tokenizer in {path} has vocab_size={found.vocab_size}, but data.vocab_size is {vocab_size}; set "
            f"it to {found.vocab_size}"
        )
    return CaptionTokenizer(found.bpe, found.vocab_size, text_len)


def streamed_captions(
    parts: Sequence[IterableDataset], weights: Sequence[float], filters: FilterPipeline, seed: int, buffer_size: int
) -> Iterator[str]:
    """Yield the first captions of each source that pass the filters, as many as its weight asks for."""
    for part, weight in zip(parts, weights, strict=True):
        records = map(filters.check, ShardReader(part, 0, 1, seed, buffer_size).one_pass())
        kept = (record for record in records if not isinstance(record, Rejection))
        captions = itertools.chain.from_iterable(record["captions"] for record in kept)
        yield from itertools.islice(captions, round(MAX_STREAMED_CAPTIONS * weight / sum(weights)))
