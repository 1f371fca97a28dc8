"""Attention patterns that are not in the package, each one function: kernels, KV cache, training and checkpoints."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import render, save
from torch import Tensor
from torch.testing import assert_close

from lightning_dalle.checkpoints import dalle_metadata, load_dalle
from lightning_dalle.errors import UserError
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.attention import flex as flex_module
from lightning_dalle.models.attention.dense import dense
from lightning_dalle.models.attention.dispatch import use_local
from lightning_dalle.models.attention.flex import flex
from lightning_dalle.models.attention.local import local
from lightning_dalle.models.attention.patterns import PATTERNS, MaskMod, Pattern, attention_pattern
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.dvae import DVAE
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.tokenizer import CaptionTokenizer


def neighbours(grid: int, kernel: int) -> MaskMod:
    """Return the pattern in which each position sees the code to its left and the one above, but not itself."""
    return lambda q, k: (q - k == 1) & (q % grid > 0) | (q - k == grid)


def above(grid: int, kernel: int) -> MaskMod:
    """Return the pattern in which each position sees itself and the code directly above."""
    return lambda q, k: (q == k) | (q - k == grid)


@pytest.fixture(scope="module", autouse=True)
def own() -> Iterator[None]:
    """Register the pattern of the docs, `diagonal`, and those of this module."""
    blocks = re.findall(r"```python\n(.*?)```", Path("docs/train.md").read_text(), re.DOTALL)
    [example] = [block for block in blocks if "@attention_pattern" in block]
    before = set(PATTERNS)
    exec(example, {})
    attention_pattern(neighbours)
    attention_pattern(above)
    assert set(PATTERNS) - before == set(OWN)
    yield
    for name in OWN:
        del PATTERNS[name]


OWN = ["diagonal", "neighbours", "above"]
MASKS = {  # of the image, on a grid of 3x3
    "diagonal": "#........ .#....... ..#...... ...#..... #...#.... .#...#... ......#.. ...#...#. #...#...#",
    "neighbours": "......... #........ .#....... #........ .#.#..... ..#.#.... ...#..... ....#.#.. .....#.#.",
    "above": "#........ .#....... ..#...... #..#..... .#..#.... ..#..#... ...#..#.. ....#..#. .....#..#",
}


def make_pattern(kind: str, grid: int = 3, text_len: int = 2) -> Pattern:
    return Pattern(kind=kind, text_len=text_len, image_len=grid**2, grid=grid, kernel=3)


@pytest.mark.parametrize("kind", OWN)
def test_its_mask_is_that_of_the_function(kind: str) -> None:
    mask = make_pattern(kind).mask()
    assert render(mask[2:, 2:]).split() == MASKS[kind].split()
    assert mask[2:, :2].all()
    assert render(mask[:2]).split() == ["#" + "." * 10, "##" + "." * 9]


@pytest.mark.parametrize(
    ("kind", "extent"), [("diagonal", (8, False)), ("neighbours", (3, False)), ("above", (3, True))]
)
def test_its_extent_is_derived_from_the_mask(kind: str, extent: tuple[int, bool]) -> None:
    pattern = make_pattern(kind)
    assert (pattern.lookback, pattern.column_major) == extent


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("grid", [3, 12])
def test_every_kernel_equals_the_formula(kind: str, grid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = make_pattern(kind, grid)
    q, k, v = torch.randn(3, 2, 2, pattern.length, 16, dtype=torch.double, requires_grad=True)
    expected = (q @ k.mT / 4).masked_fill(~pattern.mask(), -torch.inf).softmax(-1) @ v
    gradients = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for kernel in (dense, local):
        y = kernel(q, k, v, pattern)
        assert_close(y, expected)
        assert_close(torch.autograd.grad(y.square().sum(), (q, k, v)), gradients)
    monkeypatch.setattr(flex_module, "compiled", lambda: flex_module.flex_attention)
    assert_close(flex(*(x.detach().float() for x in (q, k, v)), pattern), expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "chosen"), [("diagonal", False), ("neighbours", True), ("above", True)])
def test_its_kernel_is_chosen_by_its_extent(kind: str, chosen: bool) -> None:
    assert use_local(make_pattern(kind, grid=32, text_len=65), torch.float32) == chosen


def tiny_dalle() -> DALLE:
    """Return a DALL-E whose layers are diagonal, neighbours, diagonal, above."""
    transformer = TransformerConfig(
        n_layer=4, n_head=2, n_embd=16, attention=("diagonal", "neighbours"), last_attention="above"
    )
    config = DALLEConfig(transformer=transformer, text_len=6, text_vocab_size=256, grid=4, codebook_size=11)
    dalle = DALLE(config)
    for parameter in dalle.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return dalle


def test_decode_steps_equal_the_full_forward(text_tokens: Tensor, codes: Tensor) -> None:
    dalle = tiny_dalle()
    expected = dalle(text_tokens, codes).image
    for prefilled in (0, 3, 9):
        logits, caches = dalle.prefill(text_tokens, codes[:, :prefilled])
        steps = [logits, *(dalle.decode_step(codes[:, i], caches) for i in range(prefilled, 15))]
        assert_close(torch.stack(steps, dim=1), expected[:, prefilled:], atol=1e-5, rtol=1e-5)


def test_a_model_of_own_patterns_trains(text_tokens: Tensor, codes: Tensor) -> None:
    dalle = tiny_dalle()
    optimizer = torch.optim.AdamW(dalle.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = dalle_loss(*dalle(text_tokens, codes), text_tokens, codes, 7.0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in dalle.parameters())
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2


def test_a_checkpoint_restores_the_patterns(dvae: DVAE, tmp_path: Path) -> None:
    dalle = tiny_dalle()
    tokenizer = CaptionTokenizer.train([], vocab_size=256, text_len=6)
    path = save(tmp_path / "dalle.ckpt", dalle_metadata(dalle, dvae, tokenizer, None), dalle=dalle, dvae=dvae)
    loaded = load_dalle(path).dalle
    assert [pattern.kind for pattern in loaded.transformer.patterns] == ["diagonal", "neighbours", "diagonal", "above"]
    assert loaded.config == dalle.config
    assert hash(loaded.config) == hash(dalle.config)
    assert DALLEConfig.from_dict(json.loads(json.dumps(asdict(dalle.config)))) == dalle.config


def test_a_config_without_the_keys_has_the_papers_patterns() -> None:
    values = asdict(tiny_dalle().config)
    del values["transformer"]["attention"], values["transformer"]["last_attention"]
    patterns = DALLE(DALLEConfig.from_dict(values)).transformer.patterns
    assert [pattern.kind for pattern in patterns] == ["row", "column", "row", "conv"]


def test_a_pattern_that_is_not_imported_is_named(dvae: DVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = CaptionTokenizer.train([], vocab_size=256, text_len=6)
    dalle = tiny_dalle()
    path = save(tmp_path / "dalle.ckpt", dalle_metadata(dalle, dvae, tokenizer, None), dalle=dalle, dvae=dvae)
    monkeypatch.delitem(PATTERNS, "diagonal")
    with pytest.raises(UserError, match=r"cannot use the dalle_config in .*: attention pattern 'diagonal' "):
        load_dalle(path)
