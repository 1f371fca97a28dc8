"""Causality and embeddings of DALL-E: on which tokens and codes each logit depends."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_dalle.errors import UserError
from lightning_dalle.models.attention.patterns import Pattern
from lightning_dalle.models.dalle import DALLE, DALLEConfig, extend_vocabulary
from lightning_dalle.models.transformer import SelfAttention, TransformerConfig

KINDS = ["full", "row", "column", "conv"]


def make_attention(kind: str) -> SelfAttention:
    torch.manual_seed(0)
    config = TransformerConfig(n_layer=1, n_head=2, n_embd=8)
    return SelfAttention(config, Pattern(kind=kind, text_len=6, image_len=16, grid=4, kernel=3)).double()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_exactly_the_visible_positions(kind: str) -> None:
    attention = make_attention(kind)
    x = torch.randn(1, 22, 8, dtype=torch.double, requires_grad=True)
    for q, y in enumerate(attention(x)[0]):
        (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(-1) > 0, attention.pattern.mask()[q])


def test_every_layer_kind_is_in_the_tiny_model(dalle: DALLE) -> None:
    kinds = [pattern.kind for pattern in dalle.transformer.patterns]
    assert kinds == ["row", "column", "row", "row", "row", "column", "conv"]


def test_image_logits_depend_on_earlier_codes_only(dalle: DALLE, text_tokens: Tensor, codes: Tensor) -> None:
    for i in range(16):
        changed = codes.clone()
        changed[:, i:] = (changed[:, i:] + 1) % 11
        before, after = dalle(text_tokens, codes), dalle(text_tokens, changed)
        assert_close(before.image[:, : i + 1], after.image[:, : i + 1])
        assert_close(before.text, after.text)
        if i < 15:
            assert not torch.allclose(before.image[:, i + 1], after.image[:, i + 1])


def test_text_logits_depend_on_earlier_tokens_only(dalle: DALLE, text_tokens: Tensor, codes: Tensor) -> None:
    for t in range(6):
        changed = text_tokens.clone()
        changed[:, t:] = 13
        assert_close(dalle(text_tokens, codes).text[:, : t + 1], dalle(changed, codes).text[:, : t + 1])
        assert not torch.allclose(dalle(text_tokens, codes).image, dalle(changed, codes).image)


def test_a_code_is_embedded_with_its_row_and_its_column(dalle: DALLE, codes: Tensor) -> None:
    embedded = dalle.embed_codes(codes)
    for i in range(16):
        parts = dalle.image_embedding.weight[codes[:, i]], dalle.row_position.weight[i // 4]
        assert_close(embedded[:, i], sum(parts) + dalle.column_position.weight[i % 4])


def test_paddings_differ_by_position(dalle: DALLE) -> None:
    null = dalle.null_caption(2)
    assert null.tolist() == [[20, 21, 22, 23, 24, 25]] * 2
    assert len({tuple(row) for row in dalle.text_embedding(null[0]).tolist()}) == 6


def test_the_papers_transformer_has_12_billion_parameters() -> None:
    config = DALLEConfig(
        transformer=TransformerConfig(), text_len=256, text_vocab_size=16384, grid=32, codebook_size=8192
    )
    with torch.device("meta"):
        count = sum(p.numel() for p in DALLE(config).transformer.blocks.parameters() if p.ndim > 1)
    assert count == 12 * 3968**2 * 64


def test_an_invalid_transformer_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"n_embd \(10\) must be a multiple of n_head \(3\)"):
        TransformerConfig(n_embd=10, n_head=3)
    with pytest.raises(UserError, match=r"conv_kernel \(4\) must be odd"):
        TransformerConfig(conv_kernel=4)


def extended_dalle(dalle: DALLE, new_ids: range, vocab_size: int) -> DALLE:
    extended = DALLE(replace(dalle.config, text_vocab_size=vocab_size))
    extended.load_state_dict(extend_vocabulary(dalle.state_dict(), new_ids, vocab_size))
    return extended


def test_an_extension_by_no_tokens_changes_no_weight(dalle: DALLE) -> None:
    weights = dalle.state_dict()
    extended = extend_vocabulary(weights, range(17, 17), vocab_size=20)
    assert list(extended) == list(weights)
    assert all(torch.equal(extended[name], weights[name]) for name in weights)


def test_new_tokens_start_from_the_mean_of_the_old_ones(dalle: DALLE) -> None:
    """Extend a tokenizer of 17 tokens in a vocabulary of 20 to 23 tokens in one of 25."""
    before = {name: weight.clone() for name, weight in dalle.state_dict().items()}
    nn.init.normal_(before["text_head.bias"])
    after = extend_vocabulary(before, range(17, 23), vocab_size=25)
    for name in ("text_embedding.weight", "text_head.weight", "text_head.bias"):
        assert torch.equal(after[name][:17], before[name][:17])
        assert_close(after[name][17:23], before[name][:17].mean(0).expand(6, *before[name].shape[1:]))
    assert torch.equal(after["text_embedding.weight"][25:], before["text_embedding.weight"][20:])
    assert all(torch.equal(after[name], before[name]) for name in before if not name.startswith("text_"))


def test_captions_of_old_tokens_keep_their_logits_after_an_extension(
    dalle: DALLE, text_tokens: Tensor, codes: Tensor
) -> None:
    extended = extended_dalle(dalle, range(20, 26), vocab_size=30)
    moved = torch.where(text_tokens < 20, text_tokens, text_tokens + 10)
    assert (moved != text_tokens).any()
    before, after = dalle(text_tokens, codes), extended(moved, codes)
    assert torch.equal(after.image, before.image)
    assert_close(after.text[:, :, :20], before.text)
    nulls = [model.embed_text(model.null_caption(1)) for model in (dalle, extended)]
    assert torch.equal(*nulls)
