"""What a training of the transformer needs: parameters, memory by part, what is sent, operations.

Knows shapes and arithmetic. Knows nothing of configs or of the devices at hand.
"""

from dataclasses import dataclass

import torch
from torch import nn

from lightning_dalle.models.dalle import DALLE, DALLEConfig

STREAM = 2
"""Numbers of the residual stream that a block keeps for the backward pass, of each position and unit of the width: what
goes into its two norms.
"""
ACTIVATIONS = 14
"""And of those inside its branches: what comes out of the norms, queries, keys, values and their result, and the MLP's
four before and after GELU.
"""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Of one number of each kind."""

    weights: float
    copies: float
    """Of the blocks' matrices once more, whole, in the precision that they are multiplied in; 0 if it is theirs."""
    gradients: float
    stream: float
    """Of the residual stream."""
    activations: float
    """Inside the branches of a block."""
    messages: float = 4.0
    """Of PowerSGD's errors, and of all that it sends."""


MIXED = Bytes(weights=4.0, copies=2.0, gradients=4.0, stream=4.0, activations=2.0)
PRECISIONS = {
    "32-true": Bytes(weights=4.0, copies=0.0, gradients=4.0, stream=4.0, activations=4.0),
    "bf16-mixed": MIXED,
    "16-mixed": MIXED,
    "bf16-true": Bytes(weights=2.0, copies=0.0, gradients=2.0, stream=2.0, activations=2.0),
    "PaperPrecision": MIXED,
}
"""By Lightning's names and that of our plugin, as they are in this code."""
THE_PAPER_S = Bytes(weights=2.0, copies=0.0, gradients=2.0, stream=2.0, activations=2.0, messages=2.0)
"""Of the paper's own system, idealised: all in 16 bits, though it has gains, biases, embeddings, heads and the identity
path in 32 (appendix D).
"""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a transformer is trained."""

    devices: int
    sharded_over: int
    """Devices that share the parameters; the paper's eight GPUs of a machine."""
    batch_size: int
    """Of each device."""
    accumulated: int
    """Batches of each device that make a step."""
    bytes: Bytes
    moments: float
    """Bytes that the optimizer keeps of each weight of the blocks' matrices; of any other it is Adam's two moments."""
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
    """Bytes on each device at the end of a forward pass, by part. Workspaces and fragmentation come on top.

    What the products are taken of is cast where it is used, and autograd keeps it for the backward pass: whole, though
    the weights be split, and of the block at hand alone if that is computed once more. DDP gathers gradients in
    buckets, which are as large again; FSDP2 has a block whole, in the weights' precision, while it fetches the next.
    """
    shape, numbers = config.transformer, parameters(config)
    total, compressed = sum(numbers.values()), numbers["blocks"]
    shard, block, is_split = total / how.sharded_over, compressed / shape.n_layer, how.sharded_over > 1
    state = how.batch_size * (config.text_len + config.image_len) * shape.n_embd  # numbers of the residual stream
    inside = state * (STREAM * how.bytes.stream + ACTIVATIONS * how.bytes.activations)  # of one block
    inputs = shape.n_layer * state * how.bytes.stream
    logits = how.batch_size * (config.text_len * config.text_vocab_size + config.image_len * config.codebook_size)
    moments = compressed * how.moments + (total - compressed) * 2 * how.bytes.weights
    return {
        "weights": shard * how.bytes.weights,
        "weights in the precision of the products": how.bytes.copies
        * (block if how.checkpoints_activations else compressed),
        "gradients": shard * how.bytes.gradients,
        "the optimizer's moments": moments / how.sharded_over,
        "DDP's buckets": 0.0 if is_split or how.devices == 1 else total * how.bytes.gradients,
        "PowerSGD's error": 0.0 if how.rank is None else compressed / how.sharded_over * how.bytes.messages,
        "two whole blocks, gathered": 2 * block * how.bytes.weights if is_split else 0.0,
        "activations": inputs + inside if how.checkpoints_activations else shape.n_layer * inside,
        "logits and their gradient, in 32 bits": 2 * 4.0 * logits,
    }


def saved_by_powersgd(config: DALLEConfig, how: Training) -> float:
    """The share of the blocks' gradients that need not be sent: 1 - (1/2 + 1/m) r / d of m shards, which is the paper's
    1 - 5 r / (8 d) with its eight (appendix E.1), while no factor is as wide as its shard.
    """
    if how.rank is None:
        return 0.0
    d, m = config.transformer.n_embd, how.shards
    # q, k, v and the attention's projection, and the MLP's two: how many, and the shape of a shard (docs/powersgd.md).
    matrices = [(4, d, d / m), (1, d, 4 * d / m), (1, 4 * d / m, d)]
    factors = sum(count * m * (n + k) * min(how.rank / m, n, k) for count, n, k in matrices)
    return 1 - factors / (12 * d**2)


def sent(config: DALLEConfig, how: Training) -> dict[str, float]:
    """Bytes that each device sends in a step: between replicas by a ring all-reduce, and inside one to gather a
    block's weights for the forward pass and for the backward pass, and to scatter its gradients.

    DDP sends once a step, PowerSGD with it; FSDP2 for each batch that is accumulated.
    """
    numbers = parameters(config)
    replicas, is_split = how.devices / how.sharded_over, how.sharded_over > 1
    ring = 2 * (replicas - 1) / replicas / how.sharded_over
    plain = sum(numbers.values()) - numbers["blocks"]
    compressed = plain + numbers["blocks"] * (1 - saved_by_powersgd(config, how))
    as_they_are = ring * sum(numbers.values()) * how.bytes.gradients * (how.accumulated if is_split else 1)
    others = (how.sharded_over - 1) / how.sharded_over * sum(numbers.values())
    return {
        "between replicas, gradients as they are": as_they_are,
        "between replicas, by PowerSGD": as_they_are if how.rank is None else ring * compressed * how.bytes.messages,
        "inside a replica": others * (2 * how.bytes.weights + how.bytes.gradients) * how.accumulated,
    }


def operations(config: DALLEConfig, how: Training) -> int:
    """Floating-point operations of a step on all devices: two for each weight and position forward, twice that
    backward, and the forward pass once more where it is recomputed; attention by what its masks show.
    """
    pictures, width = how.devices * how.batch_size * how.accumulated, config.transformer.n_embd
    with torch.device("meta"):
        patterns = DALLE(config).transformer.patterns
    seen = sum(int(pattern.mask().sum()) for pattern in patterns)  # pairs of query and key, of all layers
    blocks = 2 * parameters(config)["blocks"] * (config.text_len + config.image_len) + 4 * width * seen
    logits = config.text_len * config.text_vocab_size + config.image_len * config.codebook_size
    return pictures * ((4 if how.checkpoints_activations else 3) * blocks + 3 * 2 * width * logits)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
