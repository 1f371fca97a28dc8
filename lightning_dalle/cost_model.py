"""Costs of training a transformer: number of parameters, memory per device, communication and FLOPs per step."""

from dataclasses import dataclass

import torch

from lightning_dalle.models.dalle import DALLE, DALLEConfig

RESIDUAL_ACTIVATIONS = 2
"""Residual-stream tensors that a block keeps for the backward pass: the inputs of its two norms."""
BRANCH_ACTIVATIONS = 14
"""Tensors of width d that a block's branches keep: 2 norm outputs, q, k, v, attention output, and 2 x 4 of the MLP."""


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Bytes per number, for each kind of number."""

    weights: float
    """Bytes of a weight, of a gradient, and of an activation of the residual stream."""
    compute: float
    """Bytes of an operand of a matrix product, such as an activation inside the branches of a block."""
    powersgd: float = 4.0
    """Bytes of a number in PowerSGD's error buffers and messages."""


MIXED = Bytes(weights=4.0, compute=2.0)
PRECISIONS = {
    "32-true": Bytes(weights=4.0, compute=4.0),
    "bf16-mixed": MIXED,
    "16-mixed": MIXED,
    "bf16-true": Bytes(weights=2.0, compute=2.0),
    "PaperPrecision": MIXED,
    "NativeBF16": MIXED,
}
"""Bytes by precision: Lightning's names, and this package's plugins."""
PAPER = Bytes(weights=2.0, compute=2.0, powersgd=2.0)
"""Bytes in the paper's system, simplified: gains, biases, embeddings, heads and residual stream have 32 bits there."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """Devices, batch and precision of a training run."""

    devices: int
    shard_group: int
    """Number of devices that share one copy of the parameters; 8, the GPUs of a machine, in the paper."""
    batch_size: int
    """Batch size per device."""
    accumulate_grad_batches: int
    """Batches per device and optimizer step."""
    bytes: Bytes
    moments: float
    """Bytes of optimizer state per weight of a block's matrix; other weights have Adam's two moments."""
    checkpoint_activations: bool
    """Whether only the inputs of blocks are kept and the rest is recomputed (appendix E.1)."""
    rank: int | None
    """Rank of PowerSGD over all shards of a matrix; None sends uncompressed gradients."""
    shards: int
    """Number of shards into which PowerSGD cuts a matrix."""


def count_parameters(config: DALLEConfig) -> dict[str, int]:
    """Return the number of parameters in the blocks' matrices (12 d^2 per block), and in the rest of the model."""
    with torch.device("meta"):
        dalle = DALLE(config)
    total = sum(p.numel() for p in dalle.parameters())
    blocks = sum(p.numel() for p in dalle.transformer.parameters() if p.ndim == 2)
    outer = sum(p.numel() for name, p in dalle.named_parameters() if "transformer." not in name and p.ndim == 2)
    return {"blocks": blocks, "embeddings and heads": outer, "gains and biases": total - blocks - outer}


def memory_per_device(config: DALLEConfig, setup: TrainingSetup) -> dict[str, float]:
    """Return the bytes on each device at the end of a forward pass by purpose, without workspaces and fragmentation.

    Autograd keeps the weights that were cast in a forward pass: those of all blocks, or of one block with activation
    checkpointing. Cast weights are not sharded. DDP's gradient buckets are as large as the gradients. FSDP2 gathers a
    block in the precision of the weights, and prefetches the next one.
    """
    counts, size = count_parameters(config), setup.bytes
    total, matrices, n_layer = sum(counts.values()), counts["blocks"], config.transformer.n_layer
    shard, block, is_sharded = total / setup.shard_group, matrices / n_layer, setup.shard_group > 1
    residual = setup.batch_size * (config.text_len + config.image_len) * config.transformer.n_embd
    block_activations = residual * (RESIDUAL_ACTIVATIONS * size.weights + BRANCH_ACTIVATIONS * size.compute)
    block_inputs = n_layer * residual * size.weights
    kept_blocks = 1 if setup.checkpoint_activations else n_layer
    cast_weight = 0.0 if size.compute == size.weights else size.compute
    logits = setup.batch_size * (config.text_len * config.text_vocab_size + config.image_len * config.codebook_size)
    moments = matrices * setup.moments + (total - matrices) * 2 * size.weights
    return {
        "weights": shard * size.weights,
        "weights cast for matrix products": cast_weight * kept_blocks * block,
        "gradients": shard * size.weights,
        "optimizer moments": moments / setup.shard_group,
        "DDP buckets": 0.0 if is_sharded or setup.devices == 1 else total * size.weights,
        "PowerSGD error": 0.0 if setup.rank is None else matrices / setup.shard_group * size.powersgd,
        "two gathered blocks": 2 * block * size.weights if is_sharded else 0.0,
        "activations": kept_blocks * block_activations + setup.checkpoint_activations * block_inputs,
        "logits and their gradient in fp32": 2 * 4.0 * logits,
    }


def powersgd_savings(config: DALLEConfig, setup: TrainingSetup) -> float:
    """Return the fraction of the blocks' gradient bytes that PowerSGD does not send.

    With m shards, rank r and width d it is 1 - (1/2 + 1/m) r / d, unless a factor is as wide as its shard. The paper's
    eight shards give 1 - 5 r / (8 d) (appendix E.1).
    """
    if setup.rank is None:
        return 0.0
    d, m = config.transformer.n_embd, setup.shards
    # Count and shard shape of q, k, v and the attention projection, then of the MLP's two (docs/powersgd.md).
    matrices = [(4, d, d / m), (1, d, 4 * d / m), (1, 4 * d / m, d)]
    factors = sum(count * m * (n + k) * min(setup.rank / m, n, k) for count, n, k in matrices)
    return 1 - factors / (12 * d**2)


def communication(config: DALLEConfig, setup: TrainingSetup) -> dict[str, float]:
    """Return the bytes that each device sends per optimizer step, by purpose.

    Replicas average gradients with a ring all-reduce: DDP and PowerSGD once a step, FSDP2 once per accumulated batch.
    Within a replica, FSDP2 gathers weights for the forward and the backward pass and reduce-scatters gradients.
    """
    counts, size = count_parameters(config), setup.bytes
    total, replicas, is_sharded = sum(counts.values()), setup.devices / setup.shard_group, setup.shard_group > 1
    ring = 2 * (replicas - 1) / replicas / setup.shard_group
    compressed = total - counts["blocks"] * powersgd_savings(config, setup)
    uncompressed = ring * total * size.weights * (setup.accumulate_grad_batches if is_sharded else 1)
    others = (setup.shard_group - 1) / setup.shard_group * total
    return {
        "between replicas, uncompressed": uncompressed,
        "between replicas, PowerSGD": uncompressed if setup.rank is None else ring * compressed * size.powersgd,
        "within a replica": others * 3 * size.weights * setup.accumulate_grad_batches,
    }


def flops(config: DALLEConfig, setup: TrainingSetup) -> int:
    """Return the floating-point operations of an optimizer step on all devices together.

    A forward pass takes two operations per weight and position, plus attention over the visible pairs of positions. A
    backward pass takes twice as many. Activation checkpointing repeats the forward pass of the blocks.
    """
    images, width = setup.devices * setup.batch_size * setup.accumulate_grad_batches, config.transformer.n_embd
    with torch.device("meta"):
        patterns = DALLE(config).transformer.patterns
    visible_pairs = sum(int(pattern.mask().sum()) for pattern in patterns)
    positions = config.text_len + config.image_len
    blocks = 2 * count_parameters(config)["blocks"] * positions + 4 * width * visible_pairs
    logits = config.text_len * config.text_vocab_size + config.image_len * config.codebook_size
    return images * ((4 if setup.checkpoint_activations else 3) * blocks + 3 * 2 * width * logits)
