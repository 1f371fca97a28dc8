"""A transformer that no process holds whole: split among the devices of a machine, block by block (paper, Fig. 5).

Knows Lightning's ModelParallelStrategy, FSDP2 and activation checkpointing. Knows nothing of losses or data.
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Generator, Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_dalle.errors import UserError
from lightning_dalle.models.dalle import DALLE, DALLEConfig


def build(config: DALLEConfig, trainer: pl.Trainer, checkpoint_activations: bool) -> DALLE:
    """A new model, or this process's part of it where the strategy is ModelParallelStrategy.

    Its weights hang on the seed of `seed_everything` alone, however many processes hold them.

    Args:
        config: its shape.
        trainer: whose strategy says whether and among whom it is split.
        checkpoint_activations: keep the input alone of each block for the backward pass.

    Raises:
        UserError: if it is split, and a callback would copy it.
    """
    with torch.device("meta"):
        dalle = DALLE(config)
    blocks, device = dalle.transformer.blocks, torch.device("cpu")  # from where Lightning moves it
    if checkpoint_activations:
        for i, block in enumerate(blocks):
            blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)  # nothing is random in a block
    if isinstance(trainer.strategy, ModelParallelStrategy):
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                needs_the_whole_model(trainer, type(callback).__name__)
        shard(dalle, trainer.strategy)
        device = trainer.strategy.root_device
    dalle.to_empty(device=device)
    generator = Generator().manual_seed(torch.initial_seed())
    dalle.reset_parameters(lambda parameter, std: draw(parameter, std, generator))
    return dalle


def needs_the_whole_model(trainer: pl.Trainer, what: str) -> None:
    """Raises a UserError if the model is split."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError(
            f"{what} needs the whole model in one process, but ModelParallelStrategy splits it: leave it out, and give "
            "it the consolidated checkpoint later (docs/scale.md)"
        )


def shard(dalle: DALLE, strategy: ModelParallelStrategy) -> None:
    """Splits weights, gradients and moments among the devices of a machine; gradients are summed across machines.

    The mesh is not Lightning's, whose default takes the devices of a machine for tensor-parallel.
    """
    machines, devices = strategy.num_nodes, strategy.num_processes
    mesh = init_device_mesh(strategy.root_device.type, (machines, devices), mesh_dim_names=("machines", "devices"))
    for block in dalle.transformer.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(dalle, mesh=mesh)  # the embeddings and the heads


@torch.no_grad()
def draw(parameter: Tensor, std: float, generator: Generator) -> None:
    """Draws the whole of a parameter, and keeps what is this process's of it."""
    whole = torch.empty(parameter.shape).normal_(std=std, generator=generator)
    if isinstance(parameter, DTensor):
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(whole)
