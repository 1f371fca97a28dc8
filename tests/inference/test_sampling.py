"""The sampler alone: which codes may be drawn, how often, and that a picture hangs on its own seed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_dalle.errors import UserError
from lightning_dalle.hardware import has_native_bf16
from lightning_dalle.inference.config import SamplingOptions
from lightning_dalle.inference.sampling import (
    COLUMNS,
    ByRows,
    Graph,
    draw,
    filter_logits,
    in_native_bf16,
    sample,
    uniforms,
)
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


def kept(options: SamplingOptions, logits: Tensor = LOGITS) -> list[int]:
    return filter_logits(logits, options)[0].isfinite().nonzero().flatten().tolist()


def test_defaults_leave_the_logits_alone() -> None:
    assert_close(filter_logits(LOGITS, SamplingOptions()), LOGITS)


def test_each_filter_keeps_what_it_says() -> None:
    assert kept(SamplingOptions(top_k=2)) == [0, 1]
    assert kept(SamplingOptions(top_k=9)) == [0, 1, 2, 3]
    assert kept(SamplingOptions(top_p=0.5)) == [0]
    assert kept(SamplingOptions(top_p=0.51)) == [0, 1]
    assert kept(SamplingOptions(top_p=1.0)) == [0, 1, 2, 3]
    assert kept(SamplingOptions(min_logit=float(LOGITS[0, 2]))) == [0, 1, 2]
    assert kept(SamplingOptions(min_logit=100.0)) == [0]
    assert kept(SamplingOptions(top_k=3, min_logit=float(LOGITS[0, 1]))) == [0, 1]


def test_filters_know_the_order_from_the_logits_not_from_the_ids() -> None:
    assert kept(SamplingOptions(top_p=0.6), LOGITS.flip(-1)) == [2, 3]


def test_the_threshold_is_on_the_logit_before_the_temperature() -> None:
    assert kept(SamplingOptions(min_logit=float(LOGITS[0, 1]), temperature=0.1)) == [0, 1]


def test_a_low_temperature_sharpens() -> None:
    probability = filter_logits(LOGITS, SamplingOptions(temperature=0.5)).softmax(-1)
    assert_close(probability, LOGITS.exp() ** 2 / (LOGITS.exp() ** 2).sum())


def test_draws_follow_the_distribution() -> None:
    u = uniforms([0], 20_000)[0]
    codes = draw(LOGITS.expand(20_000, -1), u)
    assert_close(codes.bincount(minlength=4) / 20_000, LOGITS[0].exp(), atol=0.01, rtol=0)


def test_a_code_that_is_ruled_out_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(5, -1)
    edges = torch.tensor([0.0, 0.4999, 0.5, 0.9999, 1 - 1e-16], dtype=torch.double)
    assert draw(logits, edges).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_hangs_on_its_own_seed(dalle: DALLE, text_tokens: Tensor, guidance: float) -> None:
    options = SamplingOptions(guidance=guidance)
    together = sample(dalle, text_tokens, [5, 6, 7], options)
    alone = [sample(dalle, text_tokens[i : i + 1], [5 + i], options) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, sample(dalle, text_tokens, [8, 9, 10], options))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_codes_are_the_likeliest_of_the_full_forward(dalle: DALLE, text_tokens: Tensor, guidance: float) -> None:
    codes = sample(dalle, text_tokens, [0, 1, 2], SamplingOptions(top_k=1, guidance=guidance)).flatten(1)
    logits = dalle(text_tokens, codes).image
    without = dalle(dalle.null_caption(3), codes).image
    assert torch.equal((without + guidance * (logits - without)).argmax(-1), codes)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_given_rows_are_kept_and_seen(
    dalle: DALLE, text_tokens: Tensor, codes: Tensor, rows: int, guidance: float
) -> None:
    given = codes[:, : 4 * rows]
    options = SamplingOptions(top_k=1, guidance=guidance)
    made = sample(dalle, text_tokens, [0, 1, 2], options, given).flatten(1)
    assert torch.equal(made[:, : 4 * rows], given)
    logits, without = dalle(text_tokens, made).image, dalle(dalle.null_caption(3), made).image
    guided = without + guidance * (logits - without)
    assert torch.equal(guided.argmax(-1)[:, 4 * rows :], made[:, 4 * rows :])


def test_sampled_codes_can_be_trained_on(dalle: DALLE, text_tokens: Tensor) -> None:
    codes = sample(dalle, text_tokens, [0, 1, 2], SamplingOptions()).flatten(1)
    dalle(text_tokens, codes).image.sum().backward()
    assert dalle.image_embedding.weight.grad is not None


def test_progress_is_told_of_each_code(dalle: DALLE, text_tokens: Tensor, codes: Tensor) -> None:
    told: list[int] = []
    sample(dalle, text_tokens, [0, 1, 2], SamplingOptions(), codes[:, :4], lambda: told.append(1))
    assert len(told) == 12


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_options_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        SamplingOptions(**values)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_what_pictures_begin_with_is_read_once(dalle: DALLE, text_tokens: Tensor, guidance: float) -> None:
    """Candidates of two captions, two of them completions of one beginning; those of one caption share its reading."""
    read: list[tuple[int, ...]] = []
    dalle.transformer.register_forward_pre_hook(lambda module, inputs: read.append(tuple(inputs[0].shape[:2])))
    tokens = text_tokens[[0, 1, 0, 0, 1]]
    given = torch.randint(11, (1, 4)).expand(5, -1)
    sample(dalle, tokens, list(range(5)), SamplingOptions(guidance=guidance), given)
    sets = 1 if guidance == 1.0 else 2
    assert read[0] == (2 + sets - 1, 7 + 4)
    assert read[1:] == [(5 * sets, 1)] * 11


def test_a_beginning_may_end_in_the_middle_of_a_row(dalle: DALLE, text_tokens: Tensor, codes: Tensor) -> None:
    for n in (1, 6, 15):
        made = sample(dalle, text_tokens, [0, 1, 2], SamplingOptions(top_k=1), codes[:, :n]).flatten(1)
        assert torch.equal(made[:, :n], codes[:, :n])
        assert torch.equal(dalle(text_tokens, made).image.argmax(-1)[:, n:], made[:, n:])


@pytest.mark.parametrize(("guidance", "n_embd"), [(1.0, 256), (3.0, 256), (1.0, 384)])
def test_a_picture_in_16_bits_hangs_on_its_own_seed(guidance: float, n_embd: int) -> None:
    """Bit for bit, as widths and batches go that a user has; a last bit that differed would soon differ in a code."""
    torch.manual_seed(0)
    transformer = TransformerConfig(n_layer=4, n_head=4, n_embd=n_embd)  # where a row alone has another kernel
    model = DALLE(DALLEConfig(transformer=transformer, text_len=20, text_vocab_size=50, grid=4, codebook_size=256))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    halved = in_native_bf16(model.eval())
    tokens, seeds = torch.randint(50, (3, 20)).repeat_interleave(50, 0), list(range(150))
    options = SamplingOptions(guidance=guidance)
    together = sample(halved, tokens, seeds, options)
    for size, count in ((1, 20), (2, 20), (7, 35), (33, 66), (64, 150)):
        parts = [slice(begun, begun + size) for begun in range(0, count, size)]
        apart = torch.cat([sample(halved, tokens[some], seeds[some], options) for some in parts])
        assert torch.equal(apart[:count], together[:count])


@pytest.mark.parametrize("columns", [384, 768, 1024])
def test_a_row_hangs_on_none_beside_it(columns: int) -> None:
    """Those of a layer as `in_native_bf16` has it, as many as candidates and tokens of captions make."""
    if not has_native_bf16("cpu"):
        pytest.skip("this CPU only emulates bf16, and samples in fp32")
    torch.manual_seed(0)
    layer = (ByRows if columns > COLUMNS else nn.Linear)(columns, 256, dtype=torch.bfloat16)
    x = torch.randn(600, columns, dtype=torch.bfloat16)
    in_pairs = torch.cat([layer(pair) for pair in x.split(2)])
    for rows in (3, 32, 33, 34, 64, 65, 97, 150, 289, 512, 600):
        assert torch.equal(layer(x[:rows]), in_pairs[:rows]), rows


def test_no_product_has_too_many_rows_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *rest: multiplied.append(len(x)) or linear(x, *rest))
    layer, x = ByRows(4, 3), torch.randn(97, 1, 4)
    torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias))
    assert multiplied == [25, 24, 24, 24]


def test_native_16_bits_are_where_the_machine_has_them(dalle: DALLE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dalle.inference.sampling.has_native_bf16", lambda device: True)
    halved = in_native_bf16(dalle)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in dalle.parameters()} == {torch.float32}
    monkeypatch.setattr("lightning_dalle.inference.sampling.has_native_bf16", lambda device: False)
    assert in_native_bf16(dalle) is dalle


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_graph_draws_what_its_step_does(dalle: DALLE, text_tokens: Tensor, guidance: float) -> None:
    dalle, text_tokens = dalle.cuda(), text_tokens.cuda()
    made = sample(dalle, text_tokens, [0, 1, 2], SamplingOptions(top_k=1, guidance=guidance)).flatten(1)
    logits, without = dalle(text_tokens, made).image, dalle(dalle.null_caption(3), made).image
    assert torch.equal((without + guidance * (logits - without)).argmax(-1), made)
    logits, caches = dalle.begin(text_tokens, made[:, :1])
    eager = [dalle.go_on(made[:, i], caches) for i in range(1, 15)]
    with torch.inference_mode():
        logits, caches = dalle.begin(text_tokens, made[:, :1])
        first = dalle.go_on(made[:, 1], caches)
        graph = Graph(lambda codes: dalle.go_on(codes, caches), made[:, 2])
        replayed = [first, *(graph(made[:, i]).clone() for i in range(2, 15))]
    assert_close(torch.stack(replayed), torch.stack(eager))


def test_logits_that_are_no_numbers_draw_nothing(dalle: DALLE, text_tokens: Tensor) -> None:
    with torch.no_grad():
        next(dalle.transformer.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="diverged in training"):
        sample(dalle, text_tokens, [0, 1, 2], SamplingOptions())
