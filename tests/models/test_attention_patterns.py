"""Attention masks drawn as text: 6 text tokens and a 4x4 grid, as in Fig. 11 of the paper."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import render

from lightning_dalle.errors import UserError
from lightning_dalle.models.attention.patterns import PATTERNS, MaskMod, Pattern, attention_pattern, conv, row
from lightning_dalle.models.transformer import TransformerConfig


@pytest.mark.parametrize("kind", PATTERNS)
def test_mask_equals_figure_11(kind: str) -> None:
    mask = Pattern(kind=kind, text_len=6, image_len=16, grid=4, kernel=3).mask()
    assert render(mask) + "\n" == (Path(__file__).parent / "masks" / f"{kind}.txt").read_text()


def test_column_mask_on_transposed_states_is_a_triangle_for_each_column() -> None:
    """Fig. 11 (c): what makes column attention cheap."""
    image = Pattern(kind="column", text_len=6, image_len=16, grid=4, kernel=3).mask()[6:, 6:]
    transposed = torch.arange(16).view(4, 4).T.flatten()
    assert torch.equal(image[transposed][:, transposed], torch.block_diag(*[torch.ones(4, 4).tril()] * 4).bool())


def test_extents_are_the_papers_on_the_32_by_32_grid() -> None:
    q = 1000
    keys = torch.arange(q + 1)
    assert row(32, 11)(torch.tensor(q), keys).nonzero().flatten().tolist() == list(range(q - 32, q + 1))
    seen = conv(32, 11)(torch.tensor(q), keys).nonzero().flatten()
    assert len(seen) == 61
    offsets = {32 * dr + dc for dr in range(6) for dc in range(-5, 6)}
    assert {q - int(k) for k in seen} == {offset for offset in offsets if offset >= 0}


@pytest.mark.parametrize("kind", PATTERNS)
def test_lookback_is_the_largest_visible_distance(kind: str) -> None:
    pattern = Pattern(kind=kind, text_len=0, image_len=256, grid=16, kernel=5)
    q, k = pattern.mask().nonzero().T
    largest = int((q - k).max())
    assert pattern.lookback == largest
    assert pattern.column_major == (kind == "column")


@pytest.mark.parametrize(("kind", "fraction"), [("row", 0.400), ("column", 0.380), ("conv", 0.430)])
def test_fraction_of_causal_pairs_at_the_papers_size(kind: str, fraction: float) -> None:
    mask = Pattern(kind=kind, text_len=256, image_len=1024, grid=32, kernel=11).mask()
    assert mask.sum() / mask.shape[0] / (mask.shape[0] + 1) * 2 == pytest.approx(fraction, abs=5e-4)


def test_kernel_wider_than_the_grid_is_the_union_of_its_offsets() -> None:
    q, k = torch.arange(64)[:, None], torch.arange(64)[None]
    offsets = torch.tensor([8 * dr + dc for dr in range(6) for dc in range(-5, 6)])
    expected = ((q - k)[..., None] == offsets).any(-1)
    causal = q >= k
    assert torch.equal(conv(8, 11)(q, k) & causal, expected & causal)


def test_layers_are_in_the_papers_order() -> None:
    kinds = TransformerConfig(n_layer=64).layer_attention
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"]
    assert kinds[-1] == "conv"
    assert [i for i, kind in enumerate(kinds, start=1) if kind == "column"] == list(range(2, 64, 4))


def test_a_config_names_the_pattern_of_each_layer() -> None:
    config = TransformerConfig(n_layer=6, attention=("row", "full"), last_attention="column")
    assert config.layer_attention == ["row", "full", "row", "full", "row", "column"]


def test_an_unknown_pattern_is_refused() -> None:
    expected = r"attention pattern 'rwo' is unknown; expected full, row, column, conv, or import its module"
    with pytest.raises(UserError, match=expected):
        TransformerConfig(attention=("row", "rwo"))
    with pytest.raises(UserError, match=r"attention pattern 'last' is unknown"):
        TransformerConfig(last_attention="last")


@pytest.mark.parametrize("value", [[], "row"])
def test_attention_that_is_no_list_of_patterns_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=rf"attention is {re.escape(repr(value))}; expected a list of patterns"):
        TransformerConfig(attention=value)


def test_a_second_pattern_of_a_name_is_refused() -> None:
    def row(grid: int, kernel: int) -> MaskMod:
        return torch.ge

    with pytest.raises(UserError, match="an attention pattern named row already exists; rename the function"):
        attention_pattern(row)
