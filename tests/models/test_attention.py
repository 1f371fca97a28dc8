"""Each attention kernel equals the dense reference, forward and backward, in every shape that a config can request."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dalle.models.attention import flex as flex_module
from lightning_dalle.models.attention.dense import dense
from lightning_dalle.models.attention.dispatch import attend, use_flex, use_local
from lightning_dalle.models.attention.flex import block_mask, flex
from lightning_dalle.models.attention.local import BLOCK, local
from lightning_dalle.models.attention.patterns import PATTERNS, Pattern

Kernel = Callable[[Tensor, Tensor, Tensor, Pattern], Tensor]

SPARSE = ["row", "column", "conv"]
SHAPES = {  # text_len, grid, kernel, image_len
    "smallest": (1, 2, 11, 3),
    "kernel wider than the grid": (7, 3, 11, 8),
    "kernel of one": (33, 10, 1, 99),
    "odd in all": (9, 13, 5, 168),
    "grid as wide as a block": (5, 64, 3, 700),
    "all codes": (6, 16, 11, 256),
    "one code": (6, 16, 11, 1),
    "part of a row": (6, 16, 11, 85),
}


def make_pattern(kind: str, text_len: int, grid: int, kernel: int, image_len: int | None = None) -> Pattern:
    image_len = grid**2 - 1 if image_len is None else image_len
    return Pattern(kind=kind, text_len=text_len, image_len=image_len, grid=grid, kernel=kernel)


def random_qkv(
    pattern: Pattern, dtype: torch.dtype = torch.float32, head_dim: int = 8, heads: int = 3, device: str = "cpu"
) -> list[Tensor]:
    """Return queries, keys and values with the model's memory layout: views of one tensor; batch size = heads."""
    qkv = torch.randn(heads, pattern.text_len + pattern.image_len, 3, heads, head_dim).to(device, dtype)
    return [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4)]


def results(kernel: Kernel, qkv: list[Tensor], pattern: Pattern) -> list[Tensor]:
    """Return the output, and the gradients of queries, keys and values."""
    y = kernel(*qkv, pattern)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad(y, qkv, gradient)]


def formula(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
    logits = q @ k.mT / q.shape[3] ** 0.5
    return logits.masked_fill(~pattern.mask(), -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("kind", PATTERNS)
def test_dense_attention_equals_the_formula(kind: str) -> None:
    pattern = make_pattern(kind, 7, 5, 3)
    qkv = random_qkv(pattern, torch.float64)
    assert_close(results(dense, qkv, pattern), results(formula, qkv, pattern))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("head_dim", [5, 64])
def test_local_attention_equals_dense_attention(kind: str, shape: tuple[int, int, int, int], head_dim: int) -> None:
    pattern = make_pattern(kind, *shape)
    qkv = random_qkv(pattern, head_dim=head_dim)
    assert_close(results(local, qkv, pattern), results(dense, qkv, pattern), atol=1e-5, rtol=1e-5)
    doubles = [x.detach().double().requires_grad_() for x in qkv]
    assert_close(results(local, doubles, pattern), results(dense, doubles, pattern), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", SPARSE)
def test_local_attention_equals_dense_attention_on_a_64x64_grid(kind: str) -> None:
    pattern = make_pattern(kind, 256, 64, 11)
    qkv = random_qkv(pattern, heads=1)
    assert_close(results(local, qkv, pattern), results(dense, qkv, pattern), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [local, dense])
@pytest.mark.parametrize("kind", SPARSE)
def test_16_bit_attention_errs_by_rounding_only(kernel: Kernel, kind: str) -> None:
    pattern = make_pattern(kind, 33, 16, 5)
    qkv = random_qkv(pattern, torch.bfloat16, head_dim=64)
    exact = results(dense, [x.detach().double().requires_grad_() for x in qkv], pattern)
    for rounded, value in zip(results(kernel, qkv, pattern), exact, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded - value).norm() < 2**-7 * value.norm()


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("length", [1, 20, 21, 22, 100, 260, 275])
def test_attention_over_a_prefix_equals_the_prefix_of_attention(kind: str, length: int) -> None:
    pattern = make_pattern(kind, 20, 16, 5)
    q, k, v = random_qkv(pattern)
    expected = dense(q, k, v, pattern)[:, :, :length]
    assert_close(attend(q[:, :, :length], k[:, :, :length], v[:, :, :length], pattern), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SPARSE)
def test_local_attention_reads_exactly_the_visible_positions(kind: str) -> None:
    """Check that a query's gradient reaches a value if and only if the pattern shows it."""
    pattern = make_pattern(kind, 6, 9, 3)
    q, k, v = random_qkv(pattern, torch.float64, heads=1)
    reached = [torch.autograd.grad(y.sum(), v, retain_graph=True)[0][0, 0] for y in local(q, k, v, pattern)[0, 0]]
    assert torch.equal(torch.stack(reached).abs().sum(-1) > 0, pattern.mask())


@pytest.mark.parametrize(("kind", "image_position"), [("row", 400), ("column", 100), ("conv", 500)])
def test_keys_outside_the_window_are_never_multiplied(kind: str, image_position: int) -> None:
    """Check that a NaN key spoils only the queries whose window (row, conv) or column contains it."""
    pattern = make_pattern(kind, 10, 32, 3)
    q, k, v = random_qkv(pattern)
    k = k.detach()
    k[:, :, 10 + image_position] = torch.nan
    y = local(q, k, v, pattern)[0, 0, 10:]  # (i, d)
    block = image_position // BLOCK * BLOCK
    last = (image_position + pattern.lookback) // BLOCK * BLOCK + BLOCK
    spoiled = torch.zeros(pattern.image_len, dtype=torch.bool)
    spoiled[slice(image_position % 32, None, 32) if kind == "column" else slice(block, last)] = True
    assert y[~spoiled].isfinite().all()
    assert y[spoiled].isnan().any()


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SPARSE)
def test_local_attention_never_allocates_all_pairs(kind: str, dtype: torch.dtype) -> None:
    pattern = make_pattern(kind, 64, 32, 5)
    with LargestTensor() as largest:
        results(local, random_qkv(pattern, dtype, heads=1), pattern)
    assert largest.numel < (64 + 1023) ** 2 / 4


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [
        (torch.float32, {8: [], 16: ["row", "column"], 32: SPARSE, 64: SPARSE}),
        (torch.bfloat16, {8: [], 16: [], 32: SPARSE, 64: SPARSE}),
    ],
)
def test_local_attention_is_chosen_where_it_was_faster(dtype: torch.dtype, chosen: dict[int, list[str]]) -> None:
    for text_len, grid in ((17, 8), (65, 16), (257, 32), (257, 64)):
        kinds = [kind for kind in SPARSE if use_local(make_pattern(kind, text_len, grid, 11), dtype)]
        assert kinds == chosen[grid]


def test_cached_masks_work_in_training_after_inference_mode() -> None:
    for kind in SPARSE:
        for text_len, grid in ((3, 4), (65, 32)):
            pattern = make_pattern(kind, text_len, grid, 3)
            with torch.inference_mode():
                attend(*random_qkv(pattern), pattern)
            results(attend, random_qkv(pattern), pattern)


@pytest.mark.parametrize("kind", SPARSE)
def test_flex_attention_equals_dense_attention_on_a_cpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run FlexAttention uncompiled, forward only, to check mask and column order without a GPU."""
    monkeypatch.setattr(flex_module, "compiled", lambda: flex_module.flex_attention)
    pattern = make_pattern(kind, 7, 6, 3)
    q, k, v = (x.detach() for x in random_qkv(pattern, head_dim=16))
    y = flex(q, k, v, pattern)
    assert_close(y, dense(q, k, v, pattern), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "blocks"), [("row", 34), ("column", 27), ("conv", 40)])
def test_number_of_computed_blocks_at_the_papers_size(kind: str, blocks: int) -> None:
    """Compare with the 55 blocks of a causal mask, all of which column attention needs in raster order."""
    mask = block_mask(make_pattern(kind, 256, 32, 11, 1024), torch.device("cpu"))
    assert mask.full_kv_num_blocks is not None
    assert mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum() == blocks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize(("text_len", "grid"), [(257, 32), (65, 24)])
def test_flex_attention_equals_dense_attention_on_cuda(kind: str, text_len: int, grid: int) -> None:
    pattern = make_pattern(kind, text_len, grid, 11)
    qkv = random_qkv(pattern, head_dim=64, device="cuda")
    torch.set_float32_matmul_precision("highest")  # TF32 rounding would exceed the tolerance
    assert use_flex(pattern, 64)
    assert_close(results(attend, qkv, pattern), results(dense, qkv, pattern), atol=1e-4, rtol=1e-4)
