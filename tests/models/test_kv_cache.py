"""That going on from a cache is the same function as reading the whole stream, whatever is kept and thrown away."""

import itertools

import pytest
import torch
from conftest import tiny_dalle
from torch import Tensor
from torch.testing import assert_close

from lightning_dalle.models.attention.patterns import Kind, Pattern
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.kv_cache import Caches, width
from lightning_dalle.models.transformer import SelfAttention, TransformerConfig

KINDS: list[Kind] = ["full", "row", "column", "conv"]


def attention_of(kind: Kind, text_len: int = 6, grid: int = 4, kernel: int = 3) -> SelfAttention:
    torch.manual_seed(0)
    config = TransformerConfig(n_layer=1, n_head=2, n_embd=8)
    pattern = Pattern(kind=kind, text_len=text_len, image_len=grid**2 - 1, grid=grid, kernel=kernel)
    return SelfAttention(config, pattern).double()


def read(attention: SelfAttention, parts: list[Tensor]) -> list[Tensor]:
    """What an attention gives for each part of a stream, read one after the other."""
    caches = Caches([attention.pattern], like=parts[0])
    read = []
    for part in parts:
        caches.read(part.shape[1])
        read.append(attention(part, caches.layers[0]))
    return read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "kernel"), [(1, 1), (2, 3), (4, 3), (5, 5), (8, 11)])
def test_it_equals_the_whole_stream_s(kind: Kind, grid: int, kernel: int) -> None:
    """For every number of codes that are given at first, whole rows or not."""
    for text_len in (2, 7):
        attention = attention_of(kind, text_len, grid, kernel)
        x = torch.randn(2, text_len + grid**2 - 1, 8, dtype=torch.double)
        whole = attention(x)
        for given in range(0, grid**2, max(1, grid // 2)):
            steps = read(attention, list(x.split([text_len + given] + [1] * (grid**2 - 1 - given), dim=1)))
            assert_close(torch.cat(steps, dim=1), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_exactly_what_the_pattern_shows(kind: Kind) -> None:
    attention = attention_of(kind)
    seen = attention.pattern.mask()
    for begun, q in itertools.product((6, 9), (15, 20)):
        x = torch.randn(1, q + 1, 8, dtype=torch.double, requires_grad=True)
        y = read(attention, list(x.split([begun] + [1] * (q + 1 - begun), dim=1)))[-1]
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient[0].abs().sum(-1) > 0, seen[q, : q + 1])


def test_a_step_reads_no_more_than_its_kind_can_reach() -> None:
    widths = [width(Pattern(kind=kind, text_len=257, image_len=1023, grid=32, kernel=11)) for kind in KINDS]
    assert widths == [1023, 33, 32, 5 * 33 + 1]


def test_streams_that_begin_alike_go_on_apart(dalle: DALLE, text_tokens: Tensor, codes: Tensor) -> None:
    of = torch.tensor([1, 0, 0, 1, 2])
    begun = codes[:, :5]
    known = torch.cat([begun[of], torch.randint(11, (5, 11))], dim=1)
    logits, caches = dalle.begin(text_tokens, begun)
    steps = [logits[of]]
    caches.take(of)
    steps += [dalle.go_on(known[:, i], caches) for i in range(5, 15)]
    assert_close(torch.stack(steps, dim=1), dalle(text_tokens[of], known).image[:, 5:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", [0, 3, 4, 15])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_logits_equal_those_of_the_full_forward(
    given: int, qk_norm: bool, dtype: torch.dtype, text_tokens: Tensor, codes: Tensor
) -> None:
    dalle = tiny_dalle(qk_norm=qk_norm).to(dtype)
    logits, caches = dalle.begin(text_tokens, codes[:, :given])
    steps = [logits, *(dalle.go_on(codes[:, i], caches) for i in range(given, 15))]
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert_close(torch.stack(steps, dim=1), dalle(text_tokens, codes).image[:, given:], atol=tolerance, rtol=tolerance)


def test_the_papers_stream_is_kept_in_a_quarter() -> None:
    """Of 64 layers' keys of 257 + 1023 positions."""
    config = DALLEConfig(
        transformer=TransformerConfig(n_layer=64, n_head=1, n_embd=1), text_len=256, text_vocab_size=2, grid=32,
        codebook_size=2,
    )  # fmt: skip
    patterns = DALLE(config).transformer.patterns
    read_by_a_step = sum(pattern.text_len + width(pattern) for pattern in patterns)
    assert read_by_a_step < 64 * 1280 / 4
