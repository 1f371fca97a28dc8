"""PowerSGD (Vogels et al. 2019) as the paper has it: gradients travel as two thin factors (section 2.5, appendix E).

Knows gradients as DDP hands them over, and what of them a checkpoint must keep. Knows nothing of losses or optimizers.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Future, Generator, Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX
from torch.nn.parallel import DistributedDataParallel

from lightning_dalle.errors import UserError
from lightning_dalle.training.optim.param_groups import decay_groups

IDENTITY = 1e-6  # of it, added before orthogonalisation, as in the paper: columns that are zero do no harm


def in_shards(matrix: Float[Tensor, "out in"], count: int) -> Float[Tensor, "s n k"]:
    """A view of a weight as the shards that the paper compresses each for itself (appendix E.1, Table 2).

    They are cut across the longer side, transposed since the paper's weights are (in, out): s shards of (d, d / s) of
    (d, d), of (d, 4 d / s) of the MLP's first and of (4 d / s, d) of its second.
    """
    rows, columns = matrix.shape
    if rows >= columns:
        return matrix.view(count, rows // count, columns).mT
    return matrix.view(rows, count, columns // count).permute(1, 2, 0)


def orthonormal(p: Float[Tensor, "s n r"]) -> Float[Tensor, "s n r"]:
    """Orthonormal columns that span those of p, by Householder reflections, which is how LAPACK decomposes."""
    return torch.linalg.qr(p + IDENTITY * torch.eye(*p.shape[1:], device=p.device)).Q


class Factored:
    """The gradient of one matrix, as P Q^T for each of its shards, and what this process has still to send of it.

    All is in fp32. The paper has the error, the factors and their sums in 16 bits, of which 6 are the exponent, lest
    they underflow.

    Args:
        parameter: the matrix.
        count: shards that it is cut into.
        rank: columns of P and Q of each shard.
        generator: of the random Q, on the CPU, which draws the same numbers on every machine. Q is drawn once and kept.
    """

    def __init__(self, parameter: nn.Parameter, count: int, rank: int, generator: Generator) -> None:
        self.count = count
        self.error = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        n, k = in_shards(self.error, count).shape[1:]
        self.q = torch.randn(count, k, min(rank, n, k), generator=generator).to(parameter.device)

    @property
    def sent(self) -> int:
        """Numbers that a process sends of it in a step: P and Q."""
        n, k = in_shards(self.error, self.count).shape[1:]
        return self.count * (n + k) * self.q.shape[2]

    def owed(self, gradient: Float[Tensor, "out in"]) -> Float[Tensor, "s n k"]:
        """This step's gradient and what the steps before have left over."""
        return in_shards(self.error + gradient, self.count)

    def settle(
        self, gradient: Float[Tensor, "out in"], owed: Float[Tensor, "s n k"], average: Float[Tensor, "s n k"]
    ) -> None:
        """Replaces the gradient by what all processes agreed on; what this one owed beyond it is its error.

        Where a process had a gradient that is not finite, all of them get such a one, for a scaler to skip, and keep
        the error that they had: the paper too sets it to zero only where it must.
        """
        error = in_shards(self.error, self.count)
        error.copy_(torch.where(average.isfinite().all(), owed - average, error))
        in_shards(gradient, self.count).copy_(average)


def exchange(matrices: dict[Tensor, Factored], bucket: dist.GradBucket) -> Future:
    """DDP's communication hook: averages a bucket of gradients over all processes, those of `matrices` compressed.

    Two messages rather than one large: what is not compressed together with every P, then every Q.
    """
    buffer, world_size = bucket.buffer(), dist.get_world_size()
    gradients = dict(zip(bucket.parameters(), bucket.gradients(), strict=True))
    plain = [gradient for parameter, gradient in gradients.items() if parameter not in matrices]
    factored = [(matrices[parameter], gradients[parameter]) for parameter in gradients if parameter in matrices]
    ps = [matrix.owed(gradient) @ matrix.q for matrix, gradient in factored]
    first = dist.all_reduce(packed(plain + ps).div_(world_size), async_op=True).get_future()

    def decompress(arrived: Future) -> Tensor:
        averages = unpacked(arrived.value()[0], plain + ps)
        for gradient, average in zip(plain, averages, strict=False):
            gradient.copy_(average)
        if not factored:
            return buffer
        ps_hat = [orthonormal(average) for average in averages[len(plain) :]]
        # Summed anew: CUDA calls back on a stream of its own, which what is made outside of it may not outlive.
        owed = [matrix.owed(gradient) for matrix, gradient in factored]
        qs = [wanted.mT @ p_hat for wanted, p_hat in zip(owed, ps_hat, strict=True)]
        message = packed(qs).div_(world_size)
        dist.all_reduce(message)
        for (matrix, gradient), wanted, p_hat, q in zip(factored, owed, ps_hat, unpacked(message, qs), strict=True):
            matrix.settle(gradient, wanted, p_hat @ q.mT)
        return buffer

    if buffer.device.type == "cpu":
        first.wait()  # gloo would call back in threads of its own, where one bucket's Q could overtake another's
    return first.then(decompress)


def packed(tensors: list[Tensor]) -> Float[Tensor, " n"]:
    """All of them in one message, in fp32 as the paper's sums of what it does not compress."""
    return torch.cat([tensor.flatten().float() for tensor in tensors])


def unpacked(message: Float[Tensor, " n"], like: list[Tensor]) -> list[Tensor]:
    """Inverse of `packed`: views of the message in the shapes of what went into it."""
    parts = message.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By names that are the same with activations checkpointed as without, as those in a state_dict are."""
    return {name.replace(_CHECKPOINT_PREFIX, ""): parameter for name, parameter in model.named_parameters()}


def sizes(matrices: dict[str, Factored]) -> tuple[int, int]:
    """Numbers that a process sends of all matrices in a step, and those that they stand for."""
    return sum(matrix.sent for matrix in matrices.values()), sum(matrix.error.numel() for matrix in matrices.values())


class PowerSGDStrategy(DDPStrategy):
    """DDP with PowerSGD for the matrices inside the blocks; embeddings, heads, gains and biases are sent as they are.

    Of the blocks' gradients 1 - (1/2 + 1/m) r / d need not be sent (rank r, width d, m shards): the paper's
    1 - 5 r / (8 d) with its 8 shards.

    Args:
        rank: columns of each factor, all shards of a matrix together, a multiple of `shards`: 512, 640 and 896 for the
            paper's widths of 1,920, 2,688 and 3,968 (Table 1).
        shards: that every matrix is cut into, each compressed for itself; in the paper the 8 GPUs of a machine.
        seed: of the random Q.
        kwargs: of Lightning's DDPStrategy.

    Raises:
        UserError: if the rank is no positive multiple of the shards; in a fit, if a matrix cannot be cut into so many,
            the model has no blocks, or the factors are as large as their gradients.
    """

    def __init__(self, rank: int, shards: int = 8, seed: int = 0, **kwargs: Any) -> None:
        if min(rank, shards) < 1 or rank % shards:
            raise UserError(
                f"the rank of PowerSGD ({rank}) must be a multiple of its shards ({shards}), and both at least 1"
            )
        super().__init__(**kwargs)
        self.rank, self.shards, self.seed = rank, shards, seed
        self.matrices: dict[str, Factored] = {}
        self.errors: dict[str, Tensor] = {}  # of the checkpoint that a fit goes on from

    def configure_ddp(self) -> None:
        """Lightning registers a hook that it is given on CUDA alone, and trains on without it elsewhere: we do it."""
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        parameters = named_parameters(self.model.module)
        self.matrices = self._factored(self.model.module)
        for name, error in self.errors.items():
            self.matrices[name].error.copy_(error)
        self.errors = {}
        by_parameter: dict[Tensor, Factored] = {parameters[name]: matrix for name, matrix in self.matrices.items()}
        # DDP insists on a signature with torch.futures.Future, which the future of a collective is not.
        self.model.register_comm_hook(by_parameter, lambda state, bucket: exchange(state, bucket))
        sent, numel = sizes(self.matrices)
        saved = 1 - sent / numel
        rank_zero_info(f"PowerSGD: {saved:.1%} less to send of the gradients of {numel:,} weights inside the blocks")

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Adds the sum of all processes' errors, over their number.

        P, Q and the average are linear in what is owed, so only the errors' average ever counts: each process that
        goes on with it, whatever their number, makes up what they all were behind. The paper keeps the sum.
        """
        if "optimizer_states" in checkpoint:  # rather than weights alone
            checkpoint["powersgd"] = self._average_errors()
        super().save_checkpoint(checkpoint, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Takes the errors out of it; those of a run that began without PowerSGD are zero."""
        checkpoint = super().load_checkpoint(*args, **kwargs)
        self.errors = checkpoint.pop("powersgd", {})
        return checkpoint

    def _average_errors(self) -> dict[str, Tensor]:
        averages = {}
        for name, matrix in self.matrices.items():
            average = matrix.error / self.world_size
            dist.all_reduce(average)
            if self.is_global_zero:  # the one that writes
                averages[name] = average.cpu()
        return averages

    def _factored(self, model: nn.Module) -> dict[str, Factored]:
        """A Q and an error for every matrix inside the blocks."""
        hidden = {id(p) for group in decay_groups(model) if group["is_hidden"] for p in group["params"]}
        matrices, generator = {}, Generator().manual_seed(self.seed)
        for name, parameter in named_parameters(model).items():
            if id(parameter) not in hidden or not parameter.requires_grad:
                continue
            count = self.shards * 3 if "qkv" in name else self.shards  # three matrices in the paper, one above another
            if max(parameter.shape) % count:
                shape = " x ".join(map(str, parameter.shape))
                raise UserError(f"{name} is of {shape} and cannot be cut into {count} shards for PowerSGD")
            matrices[name] = Factored(parameter, count, self.rank // self.shards, generator)
        if not matrices:
            raise UserError("PowerSGD is for matrices inside a stack of blocks, but this model has none: take ddp")
        sent, numel = sizes(matrices)
        if sent >= numel:
            raise UserError(
                f"PowerSGD at rank {self.rank} in {self.shards} shards would send {sent:,} numbers instead of the "
                f"{numel:,} gradients that they stand for: take a lower rank, or ddp"
            )
        return matrices
