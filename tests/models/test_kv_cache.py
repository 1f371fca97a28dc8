"""Prefill and decode steps with a KV cache equal one forward pass without a cache."""

import itertools

import pytest
import torch
from conftest import tiny_dalle
from torch import Tensor
from torch.testing import assert_close

from lightning_dalle.models.attention.patterns import Pattern
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.kv_cache import KVCaches, cache_len
from lightning_dalle.models.transformer import SelfAttention, TransformerConfig

KINDS = ["full", "row", "column", "conv"]


def make_attention(kind: str, text_len: int = 6, grid: int = 4, kernel: int = 3) -> SelfAttention:
    torch.manual_seed(0)
    config = TransformerConfig(n_layer=1, n_head=2, n_embd=8)
    pattern = Pattern(kind=kind, text_len=text_len, image_len=grid**2 - 1, grid=grid, kernel=kernel)
    return SelfAttention(config, pattern).double()


def cached_outputs(attention: SelfAttention, parts: list[Tensor]) -> list[Tensor]:
    """Return the outputs of a layer that reads a sequence part by part."""
    caches = KVCaches([attention.pattern], like=parts[0])
    outputs = []
    for part in parts:
        caches.advance(part.shape[1])
        outputs.append(attention(part, caches.layers[0]))
    return outputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "kernel"), [(1, 1), (2, 3), (4, 3), (5, 5), (8, 11)])
def test_cached_attention_equals_attention_over_the_whole_sequence(kind: str, grid: int, kernel: int) -> None:
    """Try several numbers of prefilled codes, whole rows and parts of rows."""
    for text_len in (2, 7):
        attention = make_attention(kind, text_len, grid, kernel)
        x = torch.randn(2, text_len + grid**2 - 1, 8, dtype=torch.double)
        expected = attention(x)
        for prefilled in range(0, grid**2, max(1, grid // 2)):
            parts = x.split([text_len + prefilled] + [1] * (grid**2 - 1 - prefilled), dim=1)
            assert_close(torch.cat(cached_outputs(attention, list(parts)), dim=1), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_exactly_the_visible_positions(kind: str) -> None:
    attention = make_attention(kind)
    mask = attention.pattern.mask()
    for prefilled, q in itertools.product((6, 9), (15, 20)):
        x = torch.randn(1, q + 1, 8, dtype=torch.double, requires_grad=True)
        y = cached_outputs(attention, list(x.split([prefilled] + [1] * (q + 1 - prefilled), dim=1)))[-1]
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient[0].abs().sum(-1) > 0, mask[q, : q + 1])


def test_cache_length_is_the_span_of_visible_positions() -> None:
    lengths = [cache_len(Pattern(kind=kind, text_len=257, image_len=1023, grid=32, kernel=11)) for kind in KINDS]
    assert lengths == [1023, 33, 32, 5 * 33 + 1]


def test_reordered_caches_continue_different_sequences(dalle: DALLE, text_tokens: Tensor, codes: Tensor) -> None:
    index = torch.tensor([1, 0, 0, 1, 2])
    prefix = codes[:, :5]
    continued = torch.cat([prefix[index], torch.randint(11, (5, 11))], dim=1)
    logits, caches = dalle.prefill(text_tokens, prefix)
    steps = [logits[index]]
    caches.reorder(index)
    steps += [dalle.decode_step(continued[:, i], caches) for i in range(5, 15)]
    expected = dalle(text_tokens[index], continued).image[:, 5:]
    assert_close(torch.stack(steps, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefilled", [0, 3, 4, 15])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_logits_equal_those_of_the_full_forward(
    prefilled: int, qk_norm: bool, dtype: torch.dtype, text_tokens: Tensor, codes: Tensor
) -> None:
    dalle = tiny_dalle(qk_norm=qk_norm).to(dtype)
    logits, caches = dalle.prefill(text_tokens, codes[:, :prefilled])
    steps = [logits, *(dalle.decode_step(codes[:, i], caches) for i in range(prefilled, 15))]
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    expected = dalle(text_tokens, codes).image[:, prefilled:]
    assert_close(torch.stack(steps, dim=1), expected, atol=tolerance, rtol=tolerance)


def test_the_papers_caches_hold_less_than_a_quarter_of_all_positions() -> None:
    """Compare with 64 layers of 257 + 1023 positions."""
    config = DALLEConfig(
        transformer=TransformerConfig(n_layer=64, n_head=1, n_embd=1), text_len=256, text_vocab_size=2, grid=32,
        codebook_size=2,
    )  # fmt: skip
    patterns = DALLE(config).transformer.patterns
    assert sum(pattern.text_len + cache_len(pattern) for pattern in patterns) < 64 * 1280 / 4
