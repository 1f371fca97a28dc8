"""Each form of attention is the masked reference, forward and backward, in every shape that a config can ask for."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dalle.models.attention import dispatch, flex
from lightning_dalle.models.attention.dispatch import attend, is_for_windows, masked, windowed
from lightning_dalle.models.attention.patterns import Kind, Pattern

Form = Callable[[Tensor, Tensor, Tensor, Pattern], Tensor]

SPARSE = ["row", "column", "conv"]
SHAPES = {  # text, grid, kernel, positions of the image
    "the smallest": (1, 2, 11, 3),
    "kernel wider than the grid": (7, 3, 11, 8),
    "kernel of one": (33, 10, 1, 99),
    "odd in all": (9, 13, 5, 168),
    "grid of a block": (5, 64, 3, 700),
    "all codes": (6, 16, 11, 256),
    "one code": (6, 16, 11, 1),
    "a row begun": (6, 16, 11, 85),
}


def pattern_of(kind: Kind, text_len: int, grid: int, kernel: int, image_len: int | None = None) -> Pattern:
    image_len = grid**2 - 1 if image_len is None else image_len
    return Pattern(kind=kind, text_len=text_len, image_len=image_len, grid=grid, kernel=kernel)


def stream(
    pattern: Pattern, dtype: torch.dtype = torch.float32, head_dim: int = 8, heads: int = 3, device: str = "cpu"
) -> list[Tensor]:
    """Queries, keys and values as the model makes them, parts of one tensor; as many in the batch as heads."""
    qkv = torch.randn(heads, pattern.text_len + pattern.image_len, 3, heads, head_dim).to(device, dtype)
    return [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]


def results(form: Form, parts: list[Tensor], pattern: Pattern) -> list[Tensor]:
    """What comes out, and the gradients of queries, keys and values."""
    y = form(*parts, pattern)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, parts, gradient)]


def by_the_formula(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    logits = q @ k.mT / q.shape[3] ** 0.5
    return logits.masked_fill(~pattern.mask(), -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_reference_is_the_formula(kind: Kind) -> None:
    pattern = pattern_of(kind, 7, 5, 3)
    parts = stream(pattern, torch.float64)
    assert_close(results(masked, parts, pattern), results(by_the_formula, parts, pattern))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("head_dim", [5, 64])
def test_windows_equal_the_reference(kind: Kind, shape: tuple[int, int, int, int], head_dim: int) -> None:
    pattern = pattern_of(kind, *shape)
    parts = stream(pattern, head_dim=head_dim)
    assert_close(results(windowed, parts, pattern), results(masked, parts, pattern), atol=1e-5, rtol=1e-5)
    doubles = [x.detach().double().requires_grad_() for x in parts]
    assert_close(results(windowed, doubles, pattern), results(masked, doubles, pattern), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", SPARSE)
def test_windows_equal_the_reference_at_the_largest_size(kind: Kind) -> None:
    pattern = pattern_of(kind, 256, 64, 11)
    parts = stream(pattern, heads=1)
    assert_close(results(windowed, parts, pattern), results(masked, parts, pattern), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [windowed, masked])
@pytest.mark.parametrize("kind", SPARSE)
def test_16_bits_err_by_what_is_rounded(form: Form, kind: Kind) -> None:
    pattern = pattern_of(kind, 33, 16, 5)
    parts = stream(pattern, torch.bfloat16, head_dim=64)
    exact = results(masked, [x.detach().double().requires_grad_() for x in parts], pattern)
    for rounded, value in zip(results(form, parts, pattern), exact, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded - value).norm() < 2**-7 * value.norm()


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("length", [1, 20, 21, 22, 100, 260, 275])
def test_the_beginning_of_a_stream_takes_what_it_takes_in_the_whole(kind: Kind, length: int) -> None:
    pattern = pattern_of(kind, 20, 16, 5)
    q, k, v = stream(pattern)
    whole = masked(q, k, v, pattern)[:, :, :length]
    assert_close(attend(q[:, :, :length], k[:, :, :length], v[:, :, :length], pattern), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SPARSE)
def test_windows_show_exactly_what_the_pattern_shows(kind: Kind) -> None:
    """A query's gradient reaches a key if and only if it may see it."""
    pattern = pattern_of(kind, 6, 9, 3)
    q, k, v = stream(pattern, torch.float64, heads=1)
    reached = [torch.autograd.grad(y.sum(), v, retain_graph=True)[0][0, 0] for y in windowed(q, k, v, pattern)[0, 0]]
    assert torch.equal(torch.stack(reached).abs().sum(-1) > 0, pattern.mask())


@pytest.mark.parametrize(("kind", "image_position"), [("row", 400), ("column", 100), ("conv", 500)])
def test_a_key_out_of_reach_is_not_even_multiplied(kind: Kind, image_position: int) -> None:
    """A NaN there reaches nothing but what sees it, or shares a window (row, conv) or a column with what sees it."""
    pattern = pattern_of(kind, 10, 32, 3)
    q, k, v = stream(pattern)
    k = k.detach()
    k[:, :, 10 + image_position] = torch.nan
    y = windowed(q, k, v, pattern)[0, 0, 10:]  # (i, d)
    block = image_position // dispatch.BLOCK * dispatch.BLOCK
    last = (image_position + pattern.reach) // dispatch.BLOCK * dispatch.BLOCK + dispatch.BLOCK
    touched = torch.zeros(pattern.image_len, dtype=torch.bool)
    touched[slice(image_position % 32, None, 32) if kind == "column" else slice(block, last)] = True
    assert y[~touched].isfinite().all()
    assert y[touched].isnan().any()


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operator gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return given


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SPARSE)
def test_windows_never_hold_all_pairs(kind: Kind, dtype: torch.dtype) -> None:
    pattern = pattern_of(kind, 64, 32, 5)
    with Largest() as largest:
        results(windowed, stream(pattern, dtype, heads=1), pattern)
    assert largest.numel < (64 + 1023) ** 2 / 4


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [
        (torch.float32, {8: [], 16: ["row", "column"], 32: SPARSE, 64: SPARSE}),
        (torch.bfloat16, {8: [], 16: [], 32: SPARSE, 64: SPARSE}),
    ],
)
def test_windows_are_chosen_where_they_were_measured_quicker(dtype: torch.dtype, chosen: dict[int, list[str]]) -> None:
    for text_len, grid in ((17, 8), (65, 16), (257, 32), (257, 64)):
        kinds = [kind for kind in SPARSE if is_for_windows(pattern_of(kind, text_len, grid, 11), dtype)]
        assert kinds == chosen[grid]


def test_what_is_kept_for_all_layers_can_be_trained_through_after_inference() -> None:
    for kind in SPARSE:
        for text_len, grid in ((3, 4), (65, 32)):
            pattern = pattern_of(kind, text_len, grid, 3)
            with torch.inference_mode():
                attend(*stream(pattern), pattern)
            results(attend, stream(pattern), pattern)


@pytest.mark.parametrize("kind", SPARSE)
def test_block_sparse_attention_is_the_reference(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention in its plain form, whose forward runs on a CPU: mask, order and their inverse are right."""
    monkeypatch.setattr(flex, "compiled", lambda: flex.flex_attention)
    pattern = pattern_of(kind, 7, 6, 3)
    q, k, v = (x.detach() for x in stream(pattern, head_dim=16))
    y = flex.block_sparse(q, k, v, pattern)
    assert_close(y, masked(q, k, v, pattern), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "blocks"), [("row", 34), ("column", 27), ("conv", 40)])
def test_blocks_that_are_looked_at_at_the_papers_size(kind: Kind, blocks: int) -> None:
    """Of 55 that a causal mask shows; columns would be in all of these in raster order."""
    mask = block_sparse.block_mask(pattern_of(kind, 256, 32, 11, 1024), torch.device("cpu"))
    assert mask.full_kv_num_blocks is not None
    assert mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum() == blocks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize(("text_len", "grid"), [(257, 32), (65, 24)])
def test_block_sparse_attention_equals_the_reference_on_cuda(kind: Kind, text_len: int, grid: int) -> None:
    pattern = pattern_of(kind, text_len, grid, 11)
    parts = stream(pattern, head_dim=64, device="cuda")
    torch.set_float32_matmul_precision("highest")  # a tensor core's short mantissa is not the form's error
    assert dispatch.is_for_blocks(pattern, 64)
    assert_close(results(attend, parts, pattern), results(masked, parts, pattern), atol=1e-4, rtol=1e-4)
