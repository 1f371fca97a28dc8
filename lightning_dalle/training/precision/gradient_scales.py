"""fp16 training with a gradient scale for each resblock (paper, section 2.4, Fig. 4, appendix D)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Bool, Float
from pytorch_lightning.plugins.precision import Precision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_dalle.errors import UserError
from lightning_dalle.models.transformer import Block

INITIAL_LOG2, MIN_LOG2, MAX_LOG2 = 13.0, 7.0, 24.0
LOG2_GROWTH, LOG2_BACKOFF = 1 / 1000, 1 / 2
BACKOFF_INTERVAL = 125


class GradientScales:
    """Gradient scale of each of n resblocks, with the paper's update rule (appendix D, 1).

    Scales are stored as base-2 logarithms, start at 13 and stay in [7, 24]. After an update, 1/1000 is added where all
    gradients of the resblock are finite; elsewhere 1/2 is subtracted, at most once in 125 updates.

    The paper multiplies 2^13, 2^7 and 2^24 by the number of replicas M, because its loss is divided by the global batch
    size. Lightning's loss is the mean over one process's batch, M times as large, and is averaged over processes in
    fp32. The gradients in fp16 therefore have the same values.
    """

    def __init__(self, n: int) -> None:
        self.log2: Float[Tensor, " n"] = torch.full((n,), INITIAL_LOG2, dtype=torch.float64)
        self.updates_since_backoff = torch.full((n,), BACKOFF_INTERVAL)
        self.num_updates = 0
        """Number of updates, including the skipped ones."""
        self.num_skipped = 0

    def __getitem__(self, i: int) -> float:
        """Return the gradient scale of resblock i."""
        return 2.0 ** float(self.log2[i])

    def update(self, is_finite: Bool[Tensor, " n"], is_skipped: bool) -> None:
        """Raise the scales of resblocks with only finite gradients, lower the others, and count the update."""
        self.num_updates, self.num_skipped = self.num_updates + 1, self.num_skipped + is_skipped
        self.updates_since_backoff += 1
        backs_off = ~is_finite & (self.updates_since_backoff >= BACKOFF_INTERVAL)
        self.updates_since_backoff[backs_off] = 0
        change = is_finite.double() * LOG2_GROWTH - backs_off.double() * LOG2_BACKOFF
        self.log2 = (self.log2 + change).clamp(MIN_LOG2, MAX_LOG2)


class UnscaleGrad(torch.autograd.Function):
    """Cast of a branch's input to fp16; its gradient is unscaled in fp32, and NaN and infinities in it become 0.

    Otherwise an overflow in one resblock would spread to all earlier ones and lower their scales too.
    """

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "b n d"], scale: float) -> Float[Tensor, "b n d"]:
        ctx.scale = scale
        return x.half()

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n d"], None]:
        return (gradient.float() / ctx.scale).nan_to_num(0.0, 0.0, 0.0), None


class ScaleGrad(torch.autograd.Function):
    """Cast of a branch's output to fp32; its gradient is scaled and cast to fp16."""

    @staticmethod
    def forward(ctx: Any, y: Float[Tensor, "b n d"], scale: float) -> Float[Tensor, "b n d"]:
        ctx.scale, ctx.dtype = scale, y.dtype
        return y.float()

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n d"], None]:
        return (gradient * ctx.scale).to(ctx.dtype), None


def scaled_forward(
    branch: nn.Module, scales: GradientScales, i: int, x: Float[Tensor, "b n d"], *others: Any
) -> Float[Tensor, "b n d"]:
    """Return the output of the i-th residual branch, computed in fp16 with scaled gradients (paper, Fig. 4).

    The branch's parameters and their gradients stay in fp32; autocast makes the fp16 copies.
    """
    scale = scales[i]
    with torch.autocast(x.device.type, dtype=torch.float16):
        y = type(branch).forward(branch, UnscaleGrad.apply(x, scale), *others)
    return ScaleGrad.apply(y, scale)


class PaperPrecision(Precision):
    """fp16 resblocks with one gradient scale each; norms, embeddings, heads and the identity path in fp32.

    An update with a NaN or infinite gradient is skipped for all parameters (paper, appendix E.2, steps 2 and 11).

    Raises:
        UserError: at the start of a fit, if the model has no resblocks.
    """

    def __init__(self) -> None:
        self.branches: list[nn.Module] = []
        self.scales = GradientScales(0)

    def connect(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Replace each branch's `forward` by a partial, which, unlike a closure, is copied by deepcopy."""
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        self.branches = [branch for block in blocks for branch in (block.attention, block.mlp)]
        if not self.branches:
            raise UserError(
                "PaperPrecision scales the gradients of a transformer's resblocks, but this model has none; "
                "use another --trainer.precision"
            )
        self.scales = GradientScales(len(self.branches))
        for i, branch in enumerate(self.branches):
            branch.forward = partial(scaled_forward, branch, self.scales, i)
        return super().connect(model, *args, **kwargs)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Step the optimizer with unscaled gradients, or without any, which changes nothing, if one is not finite."""

        def unscaled_closure() -> Any:
            loss = closure()
            self._unscale(optimizer)
            return loss

        return super().optimizer_step(optimizer, model, unscaled_closure, **kwargs)

    def _unscale(self, optimizer: Optimizer) -> None:
        parameters = [list(branch.parameters()) for branch in self.branches]
        scaled = {id(parameter) for branch in parameters for parameter in branch}
        every = [p for group in optimizer.param_groups for p in group["params"]]
        parameters.append([p for p in every if id(p) not in scaled])
        is_finite = torch.stack([_grad_norm(some).isfinite() for some in parameters]).cpu()  # one GPU synchronization
        for i, branch in enumerate(parameters[:-1]):
            for parameter in branch:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scales[i])
        is_skipped = not is_finite.all()
        self.scales.update(is_finite[:-1], is_skipped)
        if is_skipped:
            optimizer.zero_grad()  # to None

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self.scales))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self.scales).update(state_dict)

    def teardown(self) -> None:
        for branch in self.branches:
            del branch.forward
        self.branches = []


def _grad_norm(parameters: list[nn.Parameter]) -> Float[Tensor, ""]:
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # sums over the shards of all processes
