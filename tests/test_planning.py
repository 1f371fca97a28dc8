"""A plan against the paper's own figures, and against small runs that were measured."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_dalle.cli import main
from lightning_dalle.losses import dalle_loss
from lightning_dalle.models.dalle import DALLE, DALLEConfig
from lightning_dalle.models.transformer import TransformerConfig
from lightning_dalle.planning import PRECISIONS, Training, memory, operations, parameters, saved_by_powersgd, sent

PAPER = DALLEConfig(
    transformer=TransformerConfig(), text_len=256, text_vocab_size=16384, grid=32, codebook_size=8192
)  # fmt: skip
AS_THE_PAPER = Training(
    devices=1024, sharded_over=8, batch_size=1, bytes=PRECISIONS["paper"], checkpoints_activations=True, rank=896,
    shards=8,
)  # fmt: skip
SMALL = DALLEConfig(
    transformer=TransformerConfig(n_layer=4, n_head=4, n_embd=256), text_len=8, text_vocab_size=300, grid=4,
    codebook_size=64,
)  # fmt: skip
ALONE = Training(
    devices=1, sharded_over=1, batch_size=2, bytes=PRECISIONS["32-true"], checkpoints_activations=False,
    rank=None, shards=8,
)  # fmt: skip


def test_the_paper_s_weights() -> None:
    assert parameters(PAPER)["blocks"] == 12 * 3968**2 * 64
    assert round(2 * parameters(PAPER)["blocks"] / 1e9) == 24  # "the parameters take 24 GB in 16 bits"


@pytest.mark.parametrize(("width", "rank", "percent"), [(1920, 512, 83), (2688, 640, 85), (3968, 896, 86)])
def test_the_paper_s_compression(width: int, rank: int, percent: int) -> None:
    config = replace(PAPER, transformer=TransformerConfig(n_embd=width, n_head=width // 64))
    saved = saved_by_powersgd(config, replace(AS_THE_PAPER, rank=rank))
    assert saved == pytest.approx(1 - 5 * rank / (8 * width))
    assert round(100 * saved) == percent


def test_the_paper_s_training_fits_into_its_gpus() -> None:
    assert sum(memory(PAPER, AS_THE_PAPER).values()) < 16 * 2**30
    whole = sum(memory(PAPER, replace(AS_THE_PAPER, sharded_over=1)).values())
    assert whole > 16 * 2**30


def test_what_powersgd_saves_is_not_sent() -> None:
    plain = sent(PAPER, replace(AS_THE_PAPER, rank=None))["between replicas, by PowerSGD"]
    assert plain == sent(PAPER, AS_THE_PAPER)["between replicas, gradients as they are"]
    assert sent(PAPER, AS_THE_PAPER)["between replicas, by PowerSGD"] == pytest.approx(0.155 * plain, rel=0.02)
    assert all(size == 0 for size in sent(PAPER, ALONE).values())


def step(model: DALLE) -> torch.Tensor:
    text, codes = torch.zeros(2, 8, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)
    logits = model(text, codes)
    return dalle_loss(logits.text, logits.image, text, codes, 7.0)["loss"]


def test_weights_gradients_and_moments_are_those_of_a_step() -> None:
    model = DALLE(SMALL)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model).backward()
    optimizer.step()
    planned = memory(SMALL, ALONE)
    assert planned["weights"] == sum(p.nbytes for p in model.parameters())
    assert planned["gradients"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert planned["Adam's moments"] == sum(moment.nbytes for moment in moments)


def test_activations_are_those_that_autograd_keeps() -> None:
    model = DALLE(SMALL)
    kept = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor)
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(model)
    planned = memory(SMALL, ALONE)
    assert planned["activations"] == pytest.approx(sum(kept.values()), rel=0.08)


def test_operations_are_those_that_torch_counts() -> None:
    model = DALLE(SMALL)
    with FlopCounterMode(display=False) as counter:
        step(model).backward()
    assert operations(SMALL, ALONE) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_command_reads_a_fit_s_config(capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", "configs/openmoji/quickstart_dalle.yaml"]
    main(["plan", *config, "--memory", "8GiB", "--codebook_size", "512", "--grid", "8"])
    assert "3.1 M" in capsys.readouterr().out
    main(["plan", *config, "--memory", "1MiB"])
    assert "it does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "configs/openmoji/quickstart_dvae.yaml"], "a plan is of a transformer"),
        (["--config", "configs/coco/dalle.yaml", "--memory", "16"], "memory is '16'"),
        (["--config", "configs/coco/dalle.yaml", "--devices", "6", "--sharded_over", "4"], "does not divide 6"),
        (["--config", "nowhere.yaml"], "cannot be read"),
    ],
)
def test_mistakes_are_sentences(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert message in capsys.readouterr().err


def test_the_paper_s_configs_are_planned_for_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    configs = "[configs/paper/dalle_12b.yaml, configs/paper/powersgd.yaml]"
    main(["plan", "--config", configs, "--sharded_over", "8", "--memory", "16GiB"])
    printed = capsys.readouterr().out
    assert "12,092.2 M" in printed
    assert "86%" in printed
    assert "all 430,000 steps" in printed
