"""PowerSGD (Vogels et al. 2019): gradients are exchanged as two low-rank factors (paper, section 2.5, appendix E)."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Future, Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_dalle.errors import UserError
from lightning_dalle.training.optim.param_groups import param_groups

EPSILON = 1e-6
"""Multiple of the identity added before orthogonalization, as in the paper; makes columns of zeros harmless."""


def split_shards(matrix: Float[Tensor, "out in"], num_shards: int) -> Float[Tensor, "s n k"]:
    """Return a view of a weight as the shards that the paper compresses independently (appendix E.1, Table 2).

    The longer side is split. Shards are transposed because the paper's weights are (in, out). For width d and s shards,
    a shard is (d, d / s) for (d, d), (d, 4 d / s) for the MLP's first matrix and (4 d / s, d) for its second.
    """
    rows, columns = matrix.shape
    if rows >= columns:
        return matrix.view(num_shards, rows // num_shards, columns).mT
    return matrix.view(rows, num_shards, columns // num_shards).permute(1, 2, 0)


def orthonormalize(p: Float[Tensor, "s n r"]) -> Float[Tensor, "s n r"]:
    """Return orthonormal columns that span the columns of p, by LAPACK's Householder reflections."""
    return torch.linalg.qr(p + EPSILON * torch.eye(*p.shape[1:], device=p.device)).Q


class PowerSGDState:
    """Low-rank factor Q of one matrix's gradient, and this process's error-feedback residual (`error`).

    Both are in fp32. The paper stores them in 16 bits, with a 6-bit exponent against underflow.

    Args:
        rank: number of columns of P and Q per shard.
        generator: CPU generator of the initial Q; processes with equal seeds sample the same Q.
    """

    def __init__(self, parameter: nn.Parameter, num_shards: int, rank: int, generator: Generator) -> None:
        self.parameter, self.num_shards = parameter, num_shards
        self.error = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        n, k = split_shards(self.error, num_shards).shape[1:]
        self.q = torch.randn(num_shards, k, min(rank, n, k), generator=generator).to(parameter.device)

    @property
    def numel_sent(self) -> int:
        """Number of values of P and Q that a process sends in a step."""
        n, k = split_shards(self.error, self.num_shards).shape[1:]
        return self.num_shards * (n + k) * self.q.shape[2]

    def grad_plus_error(self, gradient: Float[Tensor, "out in"]) -> Float[Tensor, "s n k"]:
        """Return the gradient of this step plus the residual of the previous steps, in shards."""
        return split_shards(self.error + gradient, self.num_shards)

    def apply(
        self, gradient: Float[Tensor, "out in"], compressed: Float[Tensor, "s n k"], average: Float[Tensor, "s n k"]
    ) -> None:
        """Replace the gradient by the decompressed average, and store what compression lost as the new residual.

        If the gradient of any process is NaN or infinite, so is the average. The residual then stays unchanged, and a
        gradient scaler skips the step on all processes.

        Args:
            compressed: sum of this process's gradient and residual, in shards.
            average: decompressed average of `compressed` over all processes.
        """
        error = split_shards(self.error, self.num_shards)
        error.copy_(torch.where(average.isfinite().all(), compressed - average, error))
        split_shards(gradient, self.num_shards).copy_(average)


def powersgd_hook(states: dict[Tensor, PowerSGDState], bucket: dist.GradBucket) -> Future:
    """Average a bucket of gradients over all processes, with compression of the parameters in `states`.

    This DDP communication hook sends two messages: all P with the uncompressed gradients, then all Q.
    """
    buffer, world_size = bucket.buffer(), dist.get_world_size()
    gradients = dict(zip(bucket.parameters(), bucket.gradients(), strict=True))
    plain = [gradient for parameter, gradient in gradients.items() if parameter not in states]
    factored = [(states[parameter], gradients[parameter]) for parameter in gradients if parameter in states]
    ps = [state.grad_plus_error(gradient) @ state.q for state, gradient in factored]
    first = dist.all_reduce(flatten(plain + ps).div_(world_size), async_op=True).get_future()

    def decompress(arrived: Future) -> Tensor:
        averages = unflatten(arrived.value()[0], plain + ps)
        for gradient, average in zip(plain, averages, strict=False):
            gradient.copy_(average)
        if not factored:
            return buffer
        ps_hat = [orthonormalize(average) for average in averages[len(plain) :]]
        # Recomputed, because this runs on another CUDA stream, where tensors from outside may have been freed.
        sums = [state.grad_plus_error(gradient) for state, gradient in factored]
        qs = [total.mT @ p_hat for total, p_hat in zip(sums, ps_hat, strict=True)]
        message = flatten(qs).div_(world_size)
        dist.all_reduce(message)
        for (state, gradient), total, p_hat, q in zip(factored, sums, ps_hat, unflatten(message, qs), strict=True):
            state.apply(gradient, total, p_hat @ q.mT)
        return buffer

    if buffer.device.type == "cpu":
        first.wait()  # gloo calls back in its own threads, where the Q of two buckets could be exchanged out of order
    return first.then(decompress)


def flatten(tensors: list[Tensor]) -> Float[Tensor, " n"]:
    """Return all values in one fp32 vector, because the paper sums uncompressed gradients in fp32 too."""
    return torch.cat([tensor.flatten().float() for tensor in tensors])


def unflatten(message: Float[Tensor, " n"], like: list[Tensor]) -> list[Tensor]:
    """Return views of a vector made by `flatten`, in the shapes of the tensors in `like`."""
    parts = message.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


class PowerSGDStrategy(DDPStrategy):
    """DDP with PowerSGD for block matrices; embeddings, heads, gains and biases are sent uncompressed.

    With rank r, width d and m shards, the fraction 1 - (1/2 + 1/m) r / d of the block gradients need not be sent. The
    paper's 8 shards give 1 - 5 r / (8 d).

    Args:
        rank: number of columns of each factor, summed over the shards of a matrix; a multiple of `shards`. The paper
            has 512, 640 and 896 for widths of 1,920, 2,688 and 3,968 (Table 1).
        shards: number of shards of every matrix, compressed independently; in the paper, the 8 GPUs of a machine.
        seed: seed of the initial Q.
        kwargs: options of Lightning's DDPStrategy.

    Raises:
        UserError: if the rank is not a positive multiple of the shards. At the start of a fit: if a matrix cannot be
            split into the shards, the model has no blocks, or the factors are as large as the gradients.
    """

    def __init__(self, rank: int, shards: int = 8, seed: int = 0, **kwargs: Any) -> None:
        if min(rank, shards) < 1 or rank % shards:
            raise UserError(
                f"PowerSGD has rank={rank}, shards={shards}; set shards to at least 1 and rank to a positive multiple"
            )
        super().__init__(**kwargs)
        self.rank, self.shards, self.seed = rank, shards, seed
        self.states: dict[str, PowerSGDState] = {}
        self.errors: dict[str, Tensor] = {}  # residuals from the checkpoint of a resumed fit

    def configure_ddp(self) -> None:
        """Register the hook; Lightning registers its own option only on CUDA and silently ignores it elsewhere."""
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.states = self._new_states(self.model.module)
        for name, error in self.errors.items():
            self.states[name].error.copy_(error)
        self.errors = {}
        by_parameter: dict[Tensor, PowerSGDState] = {state.parameter: state for state in self.states.values()}
        # DDP checks for a signature with torch.futures.Future; the future of a collective is another type.
        self.model.register_comm_hook(by_parameter, lambda state, bucket: powersgd_hook(state, bucket))

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint that also stores the error-feedback residuals, averaged over all processes.

        The averaged gradient is linear in the residuals, so their mean suffices, and any number of processes can resume
        from the checkpoint. The paper stores their sum.
        """
        if "optimizer_states" in checkpoint:  # absent if only weights are saved
            checkpoint["powersgd"] = {}
            for name, state in self.states.items():
                average = state.error / self.world_size
                dist.all_reduce(average)
                if self.is_global_zero:  # only this process writes the checkpoint
                    checkpoint["powersgd"][name] = average.cpu()
        super().save_checkpoint(checkpoint, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint and its residuals, which checkpoints of runs without PowerSGD lack."""
        checkpoint = super().load_checkpoint(*args, **kwargs)
        self.errors = checkpoint.pop("powersgd", {})
        return checkpoint

    def _new_states(self, model: nn.Module) -> dict[str, PowerSGDState]:
        """Return a state for every block matrix, by name, and log the reduction of communication."""
        block_matrices = {id(p) for group in param_groups(model) if group["is_block_matrix"] for p in group["params"]}
        states, generator = {}, Generator().manual_seed(self.seed)
        for name, parameter in model.named_parameters():
            if id(parameter) not in block_matrices or not parameter.requires_grad:
                continue
            num_shards = self.shards * 3 if "qkv" in name else self.shards  # q, k and v are three matrices in the paper
            if max(parameter.shape) % num_shards:
                shape = " x ".join(map(str, parameter.shape))
                raise UserError(
                    f"PowerSGD cannot split the larger side of {name} ({shape}) into {num_shards} equal shards; change "
                    f"`shards` of the strategy, which is {self.shards}"
                )
            states[name] = PowerSGDState(parameter, num_shards, self.rank // self.shards, generator)
        if not states:
            raise UserError("PowerSGD needs a stack of blocks, but this model has none; use --trainer.strategy ddp")
        sent, numel = sum(state.numel_sent for state in states.values()), sum(s.error.numel() for s in states.values())
        if sent >= numel:
            raise UserError(
                f"PowerSGD at rank {self.rank} in {self.shards} shards would send {sent:,} values instead of {numel:,} "
                "gradients; use a lower rank, or --trainer.strategy ddp"
            )
        saved = 1 - sent / numel
        rank_zero_info(
            f"PowerSGD reduces the gradients sent for the {numel:,} weights inside the blocks by {saved:.1%}"
        )
        return states
