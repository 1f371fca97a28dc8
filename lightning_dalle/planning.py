"""What a training of the transformer needs: parameters, memory by part, what is sent, operations.

Knows shapes and arithmetic. Knows nothing of configs or of the devices at hand.
"""

from dataclasses import dataclass

import torch
from torch import nn

from lightning_dalle.models.dalle import DALLE, DALLEConfig

ACTIVATIONS = 16
"""Numbers that a block keeps for the backward pass, of each position and unit of the width: what goes into the two
norms and comes out, queries, keys, values and their result, and the MLP's four before and after GELU.
"""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Of one number of each kind."""

    weights: float
    copies: float
    """Of the weights once more, in the precision that they are multiplied in."""
    gradients: float
    moments: float
    """Of each of Adam's two."""
    activations: float


PRECISIONS = {
    "32-true": Bytes(weights=4.0, copies=0.0, gradients=4.0, moments=4.0, activations=4.0),
    "bf16-mixed": Bytes(weights=4.0, copies=2.0, gradients=4.0, moments=4.0, activations=2.0),
    "16-mixed": Bytes(weights=4.0, copies=2.0, gradients=4.0, moments=4.0, activations=2.0),
    "bf16-true": Bytes(weights=2.0, copies=0.0, gradients=2.0, moments=2.0, activations=2.0),
    "paper": Bytes(weights=2.0, copies=0.0, gradients=2.0, moments=2.0, activations=2.0),
}
"""By Lightning's names; "paper" is all in 16 bits (appendix D), but for what is no matrix of a block."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a transformer is trained."""

    devices: int
    sharded_over: int
    """Devices that share the parameters; the paper's eight GPUs of a machine."""
    batch_size: int
    """Of each device."""
    bytes: Bytes
    checkpoints_activations: bool
    """Whether only the inputs of blocks are kept, and the rest is computed once more (appendix E.1)."""
    rank: int | None
    """Of PowerSGD over all shards of a matrix; None sends gradients as they are."""
    shards: int
    """That PowerSGD cuts a matrix into."""


def parameters(config: DALLEConfig) -> dict[str, int]:
    """Their number: of the blocks' matrices, 12 d^2 a block, of embeddings and heads, and of gains and biases."""
    with torch.device("meta"):
        dalle = DALLE(config)
    matrices = sum(p.numel() for p in dalle.transformer.parameters() if p.ndim == 2)
    outer = sum(p.numel() for name, p in dalle.named_parameters() if "transformer." not in name and p.ndim == 2)
    return {"blocks": matrices, "embeddings and heads": outer, "gains and biases": _size(dalle) - matrices - outer}


def memory(config: DALLEConfig, how: Training) -> dict[str, float]:
    """Bytes on each device at the end of a forward pass, by part. Workspaces and fragmentation come on top."""
    shape, numbers = config.transformer, parameters(config)
    total, compressed = sum(numbers.values()), numbers["blocks"]
    shard = total / how.sharded_over
    positions = how.batch_size * (config.text_len + config.image_len)
    state = positions * shape.n_embd * how.bytes.activations  # of the residual stream
    kept = shape.n_layer * state * (1 if how.checkpoints_activations else ACTIVATIONS)
    block = compressed / shape.n_layer * (how.bytes.copies or how.bytes.weights)
    logits = how.batch_size * (config.text_len * config.text_vocab_size + config.image_len * config.codebook_size)
    return {
        "weights": shard * how.bytes.weights,
        "weights in the precision of the products": shard * how.bytes.copies,
        "gradients": shard * how.bytes.gradients,
        "Adam's moments": shard * 2 * how.bytes.moments,
        "PowerSGD's error": 0.0 if how.rank is None else compressed / how.sharded_over * how.bytes.gradients,
        "two whole blocks, gathered": 0.0 if how.sharded_over == 1 else 2 * block,
        "activations": kept + (ACTIVATIONS * state if how.checkpoints_activations else 0.0),
        "logits and their gradient, in 32 bits": 2 * 4.0 * logits,
    }


def saved_by_powersgd(config: DALLEConfig, how: Training) -> float:
    """The share of the blocks' gradients that need not be sent: 1 - (1/2 + 1/m) r / d of m shards, which is the paper's
    1 - 5 r / (8 d) with its eight (appendix E.1).
    """
    return 0.0 if how.rank is None else 1 - (1 / 2 + 1 / how.shards) * how.rank / config.transformer.n_embd


def sent(config: DALLEConfig, how: Training) -> dict[str, float]:
    """Bytes that each device sends in a step: between replicas by a ring all-reduce, and inside one to gather a
    block's weights for the forward pass and for the backward pass, and to scatter its gradients.
    """
    numbers = parameters(config)
    replicas = how.devices / how.sharded_over
    ring = 2 * (replicas - 1) / replicas * how.bytes.gradients / how.sharded_over
    others = (how.sharded_over - 1) / how.sharded_over * sum(numbers.values())
    plain = sum(numbers.values()) - numbers["blocks"]
    return {
        "between replicas, gradients as they are": ring * sum(numbers.values()),
        "between replicas, by PowerSGD": ring * (plain + numbers["blocks"] * (1 - saved_by_powersgd(config, how))),
        "inside a replica": others * (2 * (how.bytes.copies or how.bytes.weights) + how.bytes.gradients),
    }


def operations(config: DALLEConfig, how: Training) -> int:
    """Floating-point operations of a step on all devices: two for each weight and position forward, twice that
    backward, and the forward pass once more where it is recomputed; attention by what its masks show.
    """
    pictures, width = how.devices * how.batch_size, config.transformer.n_embd
    with torch.device("meta"):
        patterns = DALLE(config).transformer.patterns
    seen = sum(int(pattern.mask().sum()) for pattern in patterns)  # pairs of query and key, of all layers
    blocks = 2 * parameters(config)["blocks"] * (config.text_len + config.image_len) + 4 * width * seen
    logits = config.text_len * config.text_vocab_size + config.image_len * config.codebook_size
    return pictures * ((4 if how.checkpoints_activations else 3) * blocks + 3 * 2 * width * logits)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
