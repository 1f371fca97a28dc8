"""Sampling of codes: filters, frequencies, guidance, prefixes, and independence of the batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_dalle.errors import UserError
from lightning_dalle.hardware import has_native_bf16
from lightning_dalle.inference.config import SamplingConfig
from lightning_dalle.inference.sampling import (
    MAX_COLUMNS,
    BatchInvariantLinear,
    CUDAGraphStep,
    filter_logits,
    sample_codes,
    sample_from_logits,
    to_native_bf16,
    uniforms,
)
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


def kept(sampling: SamplingConfig, logits: Tensor = LOGITS) -> list[int]:
    return filter_logits(logits, sampling)[0].isfinite().nonzero().flatten().tolist()


def test_default_settings_do_not_change_the_logits() -> None:
    assert_close(filter_logits(LOGITS, SamplingConfig()), LOGITS)


def test_each_filter_keeps_the_codes_it_should() -> None:
    assert kept(SamplingConfig(top_k=2)) == [0, 1]
    assert kept(SamplingConfig(top_k=9)) == [0, 1, 2, 3]
    assert kept(SamplingConfig(top_p=0.5)) == [0]
    assert kept(SamplingConfig(top_p=0.51)) == [0, 1]
    assert kept(SamplingConfig(top_p=1.0)) == [0, 1, 2, 3]
    assert kept(SamplingConfig(logit_threshold=float(LOGITS[0, 2]))) == [0, 1, 2]
    assert kept(SamplingConfig(logit_threshold=100.0)) == [0]
    assert kept(SamplingConfig(top_k=3, logit_threshold=float(LOGITS[0, 1]))) == [0, 1]


def test_top_p_sorts_by_logit_not_by_code() -> None:
    assert kept(SamplingConfig(top_p=0.6), LOGITS.flip(-1)) == [2, 3]


def test_the_threshold_applies_before_the_temperature() -> None:
    assert kept(SamplingConfig(logit_threshold=float(LOGITS[0, 1]), temperature=0.1)) == [0, 1]


def test_a_low_temperature_sharpens_the_distribution() -> None:
    probability = filter_logits(LOGITS, SamplingConfig(temperature=0.5)).softmax(-1)
    assert_close(probability, LOGITS.exp() ** 2 / (LOGITS.exp() ** 2).sum())


def test_sampled_codes_follow_the_distribution() -> None:
    u = uniforms([0], 20_000)[0]
    codes = sample_from_logits(LOGITS.expand(20_000, -1), u)
    assert_close(codes.bincount(minlength=4) / 20_000, LOGITS[0].exp(), atol=0.01, rtol=0)


def test_a_code_with_logit_minus_infinity_is_never_sampled() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(5, -1)
    edges = torch.tensor([0.0, 0.4999, 0.5, 0.9999, 1 - 1e-16], dtype=torch.double)
    assert sample_from_logits(logits, edges).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_codes_depend_only_on_prompt_and_seed(dalle: DALLE, text_tokens: Tensor, guidance: float) -> None:
    sampling = SamplingConfig(guidance=guidance)
    together = sample_codes(dalle, text_tokens, [5, 6, 7], sampling)
    alone = [sample_codes(dalle, text_tokens[i : i + 1], [5 + i], sampling) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, sample_codes(dalle, text_tokens, [8, 9, 10], sampling))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_codes_are_the_argmax_of_the_full_forward(dalle: DALLE, text_tokens: Tensor, guidance: float) -> None:
    codes = sample_codes(dalle, text_tokens, [0, 1, 2], SamplingConfig(top_k=1, guidance=guidance)).flatten(1)
    logits = dalle(text_tokens, codes).image
    unconditional = dalle(dalle.null_caption(3), codes).image
    assert torch.equal((unconditional + guidance * (logits - unconditional)).argmax(-1), codes)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_prefix_rows_are_kept_and_attended(
    dalle: DALLE, text_tokens: Tensor, codes: Tensor, rows: int, guidance: float
) -> None:
    prefix = codes[:, : 4 * rows]
    sampling = SamplingConfig(top_k=1, guidance=guidance)
    sampled = sample_codes(dalle, text_tokens, [0, 1, 2], sampling, prefix).flatten(1)
    assert torch.equal(sampled[:, : 4 * rows], prefix)
    logits, unconditional = dalle(text_tokens, sampled).image, dalle(dalle.null_caption(3), sampled).image
    guided = unconditional + guidance * (logits - unconditional)
    assert torch.equal(guided.argmax(-1)[:, 4 * rows :], sampled[:, 4 * rows :])


def test_sampled_codes_can_be_trained_on(dalle: DALLE, text_tokens: Tensor) -> None:
    codes = sample_codes(dalle, text_tokens, [0, 1, 2], SamplingConfig()).flatten(1)
    dalle(text_tokens, codes).image.sum().backward()
    assert dalle.image_embedding.weight.grad is not None


def test_progress_is_reported_after_each_code(dalle: DALLE, text_tokens: Tensor, codes: Tensor) -> None:
    calls: list[int] = []
    sample_codes(dalle, text_tokens, [0, 1, 2], SamplingConfig(), codes[:, :4], lambda: calls.append(1))
    assert len(calls) == 12


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_settings_raise_an_error(values: dict[str, float]) -> None:
    (name, value), *_ = values.items()
    with pytest.raises(UserError, match=f"{name} is {value}, but must be a"):
        SamplingConfig(**values)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_equal_prompts_share_one_prefill(dalle: DALLE, text_tokens: Tensor, guidance: float) -> None:
    """Five candidates of two prompts and one image prefix prefill two rows, and one empty caption with guidance."""
    shapes: list[tuple[int, ...]] = []
    dalle.transformer.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    tokens = text_tokens[[0, 1, 0, 0, 1]]
    prefix = torch.randint(11, (1, 4)).expand(5, -1)
    sample_codes(dalle, tokens, list(range(5)), SamplingConfig(guidance=guidance), prefix)
    cfg_factor = 1 if guidance == 1.0 else 2
    assert shapes[0] == (2 + cfg_factor - 1, 7 + 4)
    assert shapes[1:] == [(5 * cfg_factor, 1)] * 11


def test_a_prefix_may_end_in_the_middle_of_a_row(dalle: DALLE, text_tokens: Tensor, codes: Tensor) -> None:
    for n in (1, 6, 15):
        sampled = sample_codes(dalle, text_tokens, [0, 1, 2], SamplingConfig(top_k=1), codes[:, :n]).flatten(1)
        assert torch.equal(sampled[:, :n], codes[:, :n])
        assert torch.equal(dalle(text_tokens, sampled).image.argmax(-1)[:, n:], sampled[:, n:])


@pytest.mark.parametrize(("guidance", "n_embd"), [(1.0, 256), (3.0, 256), (1.0, 384)])
def test_codes_in_bf16_depend_only_on_prompt_and_seed(guidance: float, n_embd: int) -> None:
    """Widths and batch sizes are realistic: a difference in the last bit of a logit would soon change a code."""
    torch.manual_seed(0)
    transformer = TransformerConfig(n_layer=4, n_head=4, n_embd=n_embd)  # a single row has another kernel
    model = DALLE(DALLEConfig(transformer=transformer, text_len=20, text_vocab_size=50, grid=4, codebook_size=256))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    bf16 = to_native_bf16(model.eval())
    tokens, seeds = torch.randint(50, (3, 20)).repeat_interleave(50, 0), list(range(150))
    sampling = SamplingConfig(guidance=guidance)
    together = sample_codes(bf16, tokens, seeds, sampling)
    for size, count in ((1, 20), (2, 20), (7, 35), (33, 66), (64, 150)):
        parts = [slice(start, start + size) for start in range(0, count, size)]
        separate = torch.cat([sample_codes(bf16, tokens[some], seeds[some], sampling) for some in parts])
        assert torch.equal(separate[:count], together[:count])


@pytest.mark.parametrize("columns", [384, 768, 1024])
def test_a_rows_product_does_not_depend_on_the_number_of_rows(columns: int) -> None:
    """Layers are those of `to_native_bf16`, with as many rows as candidates and prefilled tokens make."""
    if not has_native_bf16("cpu"):
        pytest.skip("this CPU only emulates bf16, and samples in fp32")
    torch.manual_seed(0)
    layer = (BatchInvariantLinear if columns > MAX_COLUMNS else nn.Linear)(columns, 256, dtype=torch.bfloat16)
    x = torch.randn(600, columns, dtype=torch.bfloat16)
    in_pairs = torch.cat([layer(pair) for pair in x.split(2)])
    for rows in (3, 32, 33, 34, 64, 65, 97, 150, 289, 512, 600):
        assert torch.equal(layer(x[:rows]), in_pairs[:rows]), rows


def test_a_batch_invariant_layer_splits_rows_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: num_rows.append(len(x)) or linear(x, *rest))
    layer, x = BatchInvariantLinear(4, 3), torch.randn(97, 1, 4)
    torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias))
    assert num_rows == [25, 24, 24, 24]


def test_weights_become_bf16_only_where_it_is_native(dalle: DALLE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dalle.inference.sampling.has_native_bf16", lambda device: True)
    bf16 = to_native_bf16(dalle)
    assert {p.dtype for p in bf16.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in dalle.parameters()} == {torch.float32}
    monkeypatch.setattr("lightning_dalle.inference.sampling.has_native_bf16", lambda device: False)
    assert to_native_bf16(dalle) is dalle


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_cuda_graph_samples_the_codes_of_its_step(dalle: DALLE, text_tokens: Tensor, guidance: float) -> None:
    dalle, text_tokens = dalle.cuda(), text_tokens.cuda()
    sampled = sample_codes(dalle, text_tokens, [0, 1, 2], SamplingConfig(top_k=1, guidance=guidance)).flatten(1)
    logits, unconditional = dalle(text_tokens, sampled).image, dalle(dalle.null_caption(3), sampled).image
    assert torch.equal((unconditional + guidance * (logits - unconditional)).argmax(-1), sampled)
    logits, caches = dalle.prefill(text_tokens, sampled[:, :1])
    eager = [dalle.decode_step(sampled[:, i], caches) for i in range(1, 15)]
    with torch.inference_mode():
        logits, caches = dalle.prefill(text_tokens, sampled[:, :1])
        first = dalle.decode_step(sampled[:, 1], caches)
        graph = CUDAGraphStep(lambda codes: dalle.decode_step(codes, caches), sampled[:, 2])
        replayed = [first, *(graph(sampled[:, i]).clone() for i in range(2, 15))]
    assert_close(torch.stack(replayed), torch.stack(eager))


def test_nan_logits_raise_an_error(dalle: DALLE, text_tokens: Tensor) -> None:
    with torch.no_grad():
        next(dalle.transformer.parameters()).fill_(torch.nan)
    with pytest.raises(
        UserError, match="logits contain NaN or infinite values: training diverged, so use an earlier checkpoint"
    ):
        sample_codes(dalle, text_tokens, [0, 1, 2], SamplingConfig())
