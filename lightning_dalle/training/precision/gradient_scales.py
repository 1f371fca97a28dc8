"""fp16 as the paper trains in it: a gradient scale for each resblock (Fig. 4, section 2.4, appendix D).

Knows blocks by the names of their residual branches, and Lightning's hooks for precision. Knows nothing of losses or
data.
"""

from collections.abc import Callable
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

FIRST, LEAST, LARGEST = 13.0, 7.0, 24.0
GROWTH, BACKOFF = 1 / 1000, 1 / 2
WINDOW = 125


class GradientScales:
    """One scale for each of n resblocks, and the paper's rule by which they follow the gradients (appendix D, 1).

    As base-2 logarithms: at first 13; after each update plus 1/1000 where all gradients of the resblock's parameters
    are finite, else minus 1/2, though not twice within 125 updates; always in [7, 24].

    The paper's 2^13, 2^7 and 2^24 are multiplied by the number of replicas M, since its loss is divided by the batch of
    all of them. In Lightning it is the mean over a process's own, M times as large, and the gradients' mean is taken
    afterwards, in 32 bits: the numbers in fp16 are the same.
    """

    def __init__(self, n: int) -> None:
        self.log2: Float[Tensor, " n"] = torch.full((n,), FIRST, dtype=torch.float64)
        self.since_division = torch.full((n,), WINDOW)
        self.updates = 0
        """How many there have been, those that were skipped among them."""
        self.skipped = 0

    def __getitem__(self, i: int) -> float:
        """The scale of resblock i."""
        return 2.0 ** float(self.log2[i])

    def update(self, is_finite: Bool[Tensor, " n"], is_skipped: bool) -> None:
        """After an update's gradients were found finite or not, in each resblock."""
        self.updates, self.skipped = self.updates + 1, self.skipped + is_skipped
        self.since_division += 1
        divided = ~is_finite & (self.since_division >= WINDOW)
        self.since_division[divided] = 0
        change = is_finite.double() * GROWTH - divided.double() * BACKOFF
        self.log2 = (self.log2 + change).clamp(LEAST, LARGEST)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Entered(torch.autograd.Function):
    """What a resblock reads. Backwards: to 32 bits, unscaled, and filtered: what is not finite becomes 0.

    Without the filter an overflow here would be one in all resblocks before it, and lower their scales.
    """

    @staticmethod
    def forward(ctx: Any, x: Float[Tensor, "b n d"], scale: float) -> Float[Tensor, "b n d"]:
        ctx.scale = scale
        return x.half()

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n d"], None]:
        return (gradient.float() / ctx.scale).nan_to_num(0.0, 0.0, 0.0), None


class Left(torch.autograd.Function):
    """What a resblock adds to the identity path, in 32 bits. Backwards: scaled, to 16 bits."""

    @staticmethod
    def forward(ctx: Any, y: Float[Tensor, "b n d"], scale: float) -> Float[Tensor, "b n d"]:
        ctx.scale, ctx.dtype = scale, y.dtype
        return y.float()

    @staticmethod
    def backward(ctx: Any, gradient: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n d"], None]:
        return (gradient * ctx.scale).to(ctx.dtype), None


class ScaledForward:
    """A residual branch's forward in fp16, between the two ends of its gradient scale (Fig. 4).

    It takes the place of the branch's own, whose class and parameters stay as they are. Of the parameters, fp16 copies
    are multiplied; they themselves, and their gradients, are in 32 bits.

    Args:
        branch: a block's attention or MLP.
        scales: of all branches.
        i: the branch's place among them.
    """

    def __init__(self, branch: nn.Module, scales: GradientScales, i: int) -> None:
        self.branch, self.scales, self.i = branch, scales, i

    def __call__(self, x: Float[Tensor, "b n d"], *others: Any) -> Float[Tensor, "b n d"]:
        scale = self.scales[self.i]
        with torch.autocast(x.device.type, dtype=torch.float16):
            y = type(self.branch).forward(self.branch, Entered.apply(x, scale), *others)
        return Left.apply(y, scale)


class PaperPrecision(Precision):
    """Resblocks in fp16, each with a gradient scale; all else in fp32: norms, embeddings, heads, the identity path.

    An update in whose gradients any value is not finite is skipped whole, moments and weights of all parameters
    (appendix E.2, steps 2 and 11).

    Raises:
        UserError: when it is to train a model without resblocks.
    """

    def __init__(self) -> None:
        self.branches: list[nn.Module] = []
        self.scales = GradientScales(0)

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        self.branches = [branch for block in blocks for branch in (block.attention, block.mlp)]
        if not self.branches:
            raise UserError("PaperPrecision scales the gradients of a transformer's resblocks, but this model has none")
        self.scales = GradientScales(len(self.branches))
        for i, branch in enumerate(self.branches):
            branch.forward = ScaledForward(branch, self.scales, i)
        return model, optimizers, lr_schedulers

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        loss = closure()
        parameters = [list(branch.parameters()) for branch in self.branches]
        scaled = {id(parameter) for branch in parameters for parameter in branch}
        groups = optimizer.param_groups
        parameters.append([p for group in groups for p in group["params"] if id(p) not in scaled])
        is_finite = torch.stack([_norm(some).isfinite() for some in parameters]).cpu()  # waits for a GPU, once
        for i, branch in enumerate(parameters[:-1]):
            for parameter in branch:
                if parameter.grad is not None:
                    parameter.grad.div_(self.scales[i])
        is_skipped = not is_finite.all()
        self.scales.update(is_finite[:-1], is_skipped)
        self._after_closure(model, optimizer)
        if not is_skipped:
            optimizer.step(**kwargs)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self.scales.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scales.load_state_dict(state_dict)

    def teardown(self) -> None:
        for branch in self.branches:
            del branch.forward
        self.branches = []


def _norm(parameters: list[nn.Parameter]) -> Float[Tensor, ""]:
    """Of their gradients, those in other processes' shards included."""
    norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
