"""Creation of a DALL-E, unsharded or sharded over the devices of each machine (paper, section 2.5, Fig. 5)."""

from functools import partial

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Generator, Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from lightning_dalle.errors import UserError
from lightning_dalle.models.dalle import DALLE, DALLEConfig


def build_dalle(config: DALLEConfig, trainer: pl.Trainer | None, checkpoint_activations: bool) -> DALLE:
    """Return a new DALL-E, or this process's shard of it if the strategy is ModelParallelStrategy.

    The initial weights depend only on the seed of `seed_everything`, not on the number of processes.

    Args:
        config: shape of the DALL-E.
        trainer: Trainer whose strategy determines the sharding; None for no sharding.
        checkpoint_activations: whether to store only each block's input and recompute the rest in the backward pass.

    Raises:
        UserError: if the model is sharded and a WeightAveraging callback would copy it.
    """
    with torch.device("meta"):
        dalle = DALLE(config)
    blocks, device = dalle.transformer.blocks, torch.device("cpu")  # Lightning moves it to the training device later
    if checkpoint_activations:
        for block in blocks:  # blocks use no random numbers
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if trainer is not None and isinstance(trainer.strategy, ModelParallelStrategy):
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                require_unsharded(trainer, type(callback).__name__)
        shard(dalle, trainer.strategy)
        device = trainer.strategy.root_device
    dalle.to_empty(device=device)
    generator = Generator().manual_seed(torch.initial_seed())
    dalle.reset_parameters(lambda parameter, std: fill_parameter(parameter, std, generator))
    return dalle


def require_unsharded(trainer: pl.Trainer, what: str) -> None:
    """Raise a UserError that names `what`, such as a callback, if the model is sharded."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError(
            f"{what} needs the whole model in one process, but ModelParallelStrategy shards it; remove {what} and use "
            "the consolidated checkpoint after training (docs/scale.md)"
        )


def shard(dalle: DALLE, strategy: ModelParallelStrategy) -> None:
    """Shard weights, gradients and moments over the devices of a machine; machines exchange only gradients.

    Lightning's default mesh would use the devices of a machine for tensor parallelism, so this builds its own.
    """
    machines, devices = strategy.num_nodes, strategy.num_processes
    mesh = init_device_mesh(strategy.root_device.type, (machines, devices), mesh_dim_names=("machines", "devices"))
    for block in dalle.transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(dalle, mesh=mesh)  # the embeddings and the heads


@torch.no_grad()
def fill_parameter(parameter: Tensor, std: float, generator: Generator) -> None:
    """Fill a parameter, or this process's shard of it, with normal values that do not depend on the sharding."""
    whole = torch.empty(parameter.shape).normal_(std=std, generator=generator)
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)
