"""Parameter groups, and Muon combined with AdamW."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_dalle.errors import UserError
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.dvae import DVAE, DVAEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.training.optim import muon
from lightning_dalle.training.optim.adamw16 import PaperAdamW
from lightning_dalle.training.optim.muon import MuonAdamW, orthogonalize
from lightning_dalle.training.optim.param_groups import param_groups


@contextmanager
def one_process() -> Iterator[DeviceMesh]:
    """Yield a device mesh of a process group with one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def small_dalle() -> DALLE:
    torch.manual_seed(0)
    config = DALLEConfig(
        transformer=TransformerConfig(n_layer=2, n_head=2, n_embd=8), text_len=4, text_vocab_size=300, grid=4,
        codebook_size=32,
    )  # fmt: skip
    return DALLE(config)


def test_gains_biases_and_embeddings_are_not_decayed() -> None:
    dalle = small_dalle()
    block_matrices, heads, not_decayed = (group["params"] for group in param_groups(dalle))
    names = {id(parameter): name for name, parameter in dalle.named_parameters()}
    assert len(block_matrices) + len(heads) + len(not_decayed) == len(names)
    matrices = ("qkv.weight", "project.weight", "expand.weight")
    assert all(names[id(parameter)].endswith(matrices) for parameter in block_matrices)
    assert {names[id(parameter)] for parameter in heads} == {"text_head.weight", "image_head.weight"}
    assert not any(names[id(parameter)].endswith((*matrices, "head.weight")) for parameter in not_decayed)


def test_muon_updates_block_matrices_and_adamw_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "has_native_bf16", lambda device: True)  # torch's Muon always computes in bf16
    dalle, by_muon, by_adamw = small_dalle(), small_dalle(), small_dalle()
    both = MuonAdamW(param_groups(dalle), lr=1e-2, block_lr_ratio=2.0, betas=(0.9, 0.9), weight_decay=0.1)
    block_matrices, *others = param_groups(by_muon)
    torch_muon = torch.optim.Muon(block_matrices["params"], lr=2e-2, weight_decay=0.1)
    adamw = torch.optim.AdamW(param_groups(by_adamw), lr=1e-2, betas=(0.9, 0.9), weight_decay=0.1, fused=True)
    for _ in range(3):
        for model, optimizer in ((dalle, both), (by_muon, torch_muon), (by_adamw, adamw)):
            optimizer.zero_grad()
            for i, parameter in enumerate(model.parameters()):  # different gradients, also for parameters of one shape
                parameter.grad = torch.sin(i + torch.arange(parameter.numel())).view_as(parameter).float()
            optimizer.step()
    changed = {id(parameter) for parameter in block_matrices["params"]}
    assert others
    for ours, muon_s, adamw_s in zip(dalle.parameters(), by_muon.parameters(), by_adamw.parameters(), strict=True):
        torch.testing.assert_close(ours, muon_s if id(muon_s) in changed else adamw_s, atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_orthogonalize_brings_singular_values_close_to_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    made = orthogonalize(matrices, dtype)
    values = torch.linalg.svdvals(made.float())  # (3, 8)
    assert 0.5 < values.min() <= values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert ((made.float() * (u @ v)).sum((1, 2)) > 0.8 * values.shape[1]).all(), "the singular vectors must stay"


def test_muon_rejects_a_model_without_block_matrices() -> None:
    dvae = DVAE(DVAEConfig(image_size=16, codebook_size=4, n_group=2, n_block=1, n_hid=4, n_init=4))
    with pytest.raises(
        UserError, match="MuonAdamW needs matrices inside a stack of blocks, but this model has none; use AdamW"
    ):
        MuonAdamW(param_groups(dvae))


def test_sharded_models_are_rejected() -> None:
    with one_process() as mesh:
        dalle = fully_shard(small_dalle(), mesh=mesh)
        with pytest.raises(
            UserError, match="MuonAdamW needs whole matrices, but ModelParallelStrategy shards them; use AdamW"
        ):
            MuonAdamW(param_groups(dalle))
        with pytest.raises(
            UserError, match="PaperAdamW needs whole parameters, but ModelParallelStrategy shards them; use AdamW"
        ):
            PaperAdamW(param_groups(dalle))


def test_resumed_muon_equals_an_unbroken_run() -> None:
    def stepped(optimizer: MuonAdamW, model: DALLE, steps: int) -> None:
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = parameter.detach().cos()
            optimizer.step()

    unbroken = small_dalle()
    optimizer = MuonAdamW(param_groups(unbroken))
    stepped(optimizer, unbroken, 2)
    resumed, state = small_dalle(), copy.deepcopy(optimizer.state_dict())
    resumed.load_state_dict(unbroken.state_dict())
    stepped(optimizer, unbroken, 2)
    later = MuonAdamW(param_groups(resumed))
    later.load_state_dict(state)
    stepped(later, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))
