"""Attention masks drawn as text: 6 text tokens and a 4x4 grid, as in Fig. 11 of the paper."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from lightning_dalle.models.attention.patterns import (
    PATTERNS,
    Kind,
    Pattern,
    convolutional,
    layer_kinds,
    render,
    row,
)


def test_every_kind_has_a_pattern() -> None:
    assert list(PATTERNS) == list(get_args(Kind))


@pytest.mark.parametrize("kind", get_args(Kind))
def test_mask_equals_figure_11(kind: Kind) -> None:
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
    assert row(32, 11).mask(torch.tensor(q), keys).nonzero().flatten().tolist() == list(range(q - 32, q + 1))
    conv = convolutional(32, 11).mask(torch.tensor(q), keys).nonzero().flatten()
    assert len(conv) == 61
    offsets = {32 * dr + dc for dr in range(6) for dc in range(-5, 6)}
    assert {q - int(k) for k in conv} == {offset for offset in offsets if offset >= 0}


@pytest.mark.parametrize("kind", get_args(Kind))
def test_lookback_is_the_largest_visible_distance(kind: Kind) -> None:
    pattern = Pattern(kind=kind, text_len=0, image_len=256, grid=16, kernel=5)
    q, k = pattern.mask().nonzero().T
    largest = int((q - k).max())
    assert pattern.lookback == (256 if pattern.image.lookback is None else largest)


@pytest.mark.parametrize(("kind", "fraction"), [("row", 0.400), ("column", 0.380), ("conv", 0.430)])
def test_fraction_of_causal_pairs_at_the_papers_size(kind: Kind, fraction: float) -> None:
    mask = Pattern(kind=kind, text_len=256, image_len=1024, grid=32, kernel=11).mask()
    assert mask.sum() / mask.shape[0] / (mask.shape[0] + 1) * 2 == pytest.approx(fraction, abs=5e-4)


def test_kernel_wider_than_the_grid_is_the_union_of_its_offsets() -> None:
    q, k = torch.arange(64)[:, None], torch.arange(64)[None]
    offsets = torch.tensor([8 * dr + dc for dr in range(6) for dc in range(-5, 6)])
    expected = ((q - k)[..., None] == offsets).any(-1)
    causal = q >= k
    assert torch.equal(convolutional(8, 11).mask(q, k) & causal, expected & causal)


def test_layers_are_in_the_papers_order() -> None:
    kinds = layer_kinds(64)
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"]
    assert kinds[-1] == "conv"
    assert [i for i, kind in enumerate(kinds, start=1) if kind == "column"] == list(range(2, 64, 4))
