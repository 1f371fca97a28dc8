"""The paper's two 16-bit formats, to the bit, and AdamW with moments in them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.testing import assert_close

from lightning_dalle.errors import UserError
from lightning_dalle.training.optim.adamw16 import MEAN, VARIANCE, FloatFormat, PaperAdamW

FORMATS = pytest.mark.parametrize("form", [MEAN, VARIANCE], ids=["1-6-9", "0-6-10"])


def patterns() -> Tensor:
    return torch.arange(2**16).to(torch.int16)


@FORMATS
def test_all_bit_patterns_survive_a_round_trip(form: FloatFormat) -> None:
    values = form.decode(patterns())
    is_number = ~values.isnan()
    assert is_number.sum() == 2**16 - ((2**9 - 1) * 2 if form is MEAN else 2**10 - 1)
    assert torch.equal(form.encode(values)[is_number], patterns()[is_number])
    assert form.decode(form.encode(values))[~is_number].isnan().all()


@FORMATS
def test_decoded_values_equal_the_definition(form: FloatFormat) -> None:
    """Compute each number from the fields of its bit pattern in Python."""
    s = form.significand_bits
    for code in range(0, 63 << s, 37):
        exponent, significand = code >> s, code & 2**s - 1
        steps = significand + (2**s if exponent else 0)
        assert form.decode(torch.tensor(code).to(torch.int16)) == math.ldexp(steps, max(exponent, 1) - 59 - s)


def test_range_is_the_papers() -> None:
    """Check "the maximum value of the 1-6-9 format (which is slightly less than 16)" (appendix E.2)."""
    mean, variance = MEAN.decode(patterns()), VARIANCE.decode(patterns())
    assert mean[mean.isfinite()].max() == MEAN.max == 15.984375
    assert mean[mean.isfinite()].min() == -15.984375
    assert variance[variance.isfinite()].max() == VARIANCE.max == 15.9921875
    assert mean[mean > 0].min() == 2.0**-67
    assert variance[variance > 0].min() == 2.0**-68
    assert variance[~variance.isnan()].min() == 0


@FORMATS
def test_rounding_is_to_nearest_even(form: FloatFormat) -> None:
    """Round the midpoint of every two neighbours, and points just below and above it."""
    values = form.decode(patterns()).double()
    values = values[values.isfinite() & (values >= 0)].unique()
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    is_even = (form.encode(low.float()) & 1) == 0
    assert torch.equal(form.decode(form.encode(middle.float())).double(), torch.where(is_even, low, high))
    offset = (high - low) / 64
    assert torch.equal(form.decode(form.encode((middle - offset).float())).double(), low)
    assert torch.equal(form.decode(form.encode((middle + offset).float())).double(), high)


@FORMATS
def test_overflow_becomes_infinity_and_underflow_zero(form: FloatFormat) -> None:
    step = 16 - form.max
    x = torch.tensor([form.max + 0.49 * step, 16.0, 1e30, math.inf, 2.0**-70, 1e-40, 0.0])
    assert form.decode(form.encode(x)).tolist() == [form.max, math.inf, math.inf, math.inf, 0, 0, 0]
    assert form.decode(form.encode(torch.tensor(math.nan))).isnan()


def test_negative_numbers_mirror_the_positive() -> None:
    x = torch.randn(1000) * torch.logspace(-20, 1, 1000)
    assert torch.equal(MEAN.decode(MEAN.encode(-x)), -MEAN.decode(MEAN.encode(x)))


def trained(optimizer_class: Any, is_block_matrix: bool, steps: int = 50, **options: Any) -> nn.Parameter:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 16))
    groups = [{"params": [weight], "is_block_matrix": is_block_matrix}]
    optimizer = optimizer_class(groups, lr=1e-2, betas=(0.9, 0.96), weight_decay=4.5e-2, **options)
    for _ in range(steps):
        weight.grad = torch.randn(16, 16) * 1e-3
        optimizer.step()
    return weight


def test_32_bit_moments_equal_adamw() -> None:
    assert_close(trained(PaperAdamW, is_block_matrix=False), trained(torch.optim.AdamW, is_block_matrix=False))


def test_16_bit_moments_stay_close_to_adamw() -> None:
    ours, theirs = trained(PaperAdamW, is_block_matrix=True), trained(torch.optim.AdamW, is_block_matrix=True)
    moved = (theirs - trained(torch.optim.AdamW, is_block_matrix=True, steps=0)).norm()
    assert 0 < (ours - theirs).norm() / moved < 2e-3


def test_only_matrices_inside_blocks_have_moments_in_16_bits() -> None:
    matrix, gain = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = PaperAdamW(
        [{"params": [matrix], "is_block_matrix": True}, {"params": [gain], "is_block_matrix": False}]
    )
    (matrix.sum() + gain.sum()).backward()
    optimizer.step()
    assert {value.dtype for value in optimizer.state[matrix].values() if isinstance(value, Tensor)} == {torch.int16}
    assert {value.dtype for value in optimizer.state[gain].values() if isinstance(value, Tensor)} == {torch.float32}


@pytest.mark.parametrize("is_block_matrix", [True, False])
def test_running_variance_is_clipped_to_5_before_it_is_used(is_block_matrix: bool) -> None:
    weight = nn.Parameter(torch.zeros(1, 1))
    optimizer = PaperAdamW([{"params": [weight], "is_block_matrix": is_block_matrix}], lr=1.0, weight_decay=0.0)
    weight.grad = torch.full((1, 1), 100.0)  # variance 0.04 * 100^2 = 400
    optimizer.step()
    assert weight.item() == pytest.approx(-100 / math.sqrt(5 / 0.04))
    variance = optimizer.state[weight]["variance"]
    assert (VARIANCE.decode(variance) if is_block_matrix else variance) == 5


def test_resumed_adamw16_equals_an_unbroken_run() -> None:
    def steps(optimizer: PaperAdamW, weight: nn.Parameter, count: int) -> None:
        for i in range(count):
            weight.grad = torch.sin(weight.detach() + i) * 1e-4
            optimizer.step()

    weight, again = nn.Parameter(torch.linspace(-1, 1, 64).view(8, 8)), nn.Parameter(torch.zeros(8, 8))
    optimizer = PaperAdamW([{"params": [weight], "is_block_matrix": True}])
    steps(optimizer, weight, 3)
    resumed = PaperAdamW([{"params": [again], "is_block_matrix": True}])
    resumed.load_state_dict(optimizer.state_dict())
    again.data.copy_(weight)
    assert resumed.state[again]["mean"].dtype == torch.int16
    steps(optimizer, weight, 3)
    steps(resumed, again, 3)
    assert torch.equal(again, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_that_are_not_float32_are_rejected(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    found = str(dtype).removeprefix("torch.")
    with pytest.raises(UserError, match=f"needs parameters in float32, but some are in {found}; use a mixed"):
        PaperAdamW([{"params": [weight], "is_block_matrix": True}])


def test_sharded_parameters_are_rejected(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = nn.Parameter(distribute_tensor(torch.ones(2, 2), init_device_mesh("cpu", (1,))))
        with pytest.raises(
            UserError, match="PaperAdamW needs whole parameters, but ModelParallelStrategy shards them; use AdamW"
        ):
            PaperAdamW([{"params": [sharded], "is_block_matrix": True}])
    finally:
        torch.distributed.destroy_process_group()
