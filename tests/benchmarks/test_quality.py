"""The peer reads what we read, trains and is measured by our functions; our recipe is scaled to another length."""

import json
from pathlib import Path

import pytest
import torch
import yaml

if not (Path(__file__).parents[2] / ".peer").exists():
    pytest.skip("the peer is not installed: python -m benchmarks.peer", allow_module_level=True)

from benchmarks.dvae_quality import CONFIG, scaled
from benchmarks.peer import DALLE, DiscreteVAE, cached_images
from benchmarks.peer_training import as_peers_text
from benchmarks.quality import Data, chart, peers_run, side_by_side


def test_padding_becomes_0_and_tokens_start_at_1() -> None:
    assert as_peers_text(torch.tensor([[0, 7, 10, 11]]), vocab_size=10).tolist() == [[1, 8, 0, 0]]


def test_the_repaired_cache_generates_the_same_images() -> None:
    vae = DiscreteVAE(image_size=16, num_tokens=9, codebook_dim=8, num_layers=2, hidden_dim=8)
    dalle = DALLE(
        dim=32, vae=vae, num_text_tokens=20, text_seq_len=6, depth=4, heads=2, dim_head=16,
        attn_types=("full", "axial_row", "axial_col", "conv_like"), optimize_for_inference=True,
    ).eval()  # fmt: skip
    text = torch.randint(1, 20, (3, 6))
    torch.manual_seed(1)
    recomputed = dalle.generate_images(text)
    torch.manual_seed(1)
    torch.testing.assert_close(cached_images(dalle, text), recomputed)


def test_the_peer_is_trained_measured_and_plotted(tmp_path: Path) -> None:
    data = Data()
    (tmp_path / "rates.json").write_text(json.dumps({"steps_per_second": {"dvae": 1 / 150, "dalle": 1 / 270}}))
    run = peers_run(0.5, tmp_path, data, prompts=2)
    assert run["steps"] == {"dvae": 1, "dalle": 1}
    assert run["composition"]["right_emoji"]["of"] == 2
    assert peers_run(0.5, tmp_path, data, prompts=3) == run  # not trained again
    shares, psnr = chart({"ours": run, "theirs": run}).axes
    assert [bar.get_height() for bar in psnr.patches] == [run["reconstruction"]["dvae"]["psnr_db"]["value"]] * 2
    assert len(shares.patches) == 4
    sheet = side_by_side([tmp_path / "0.5x" / "samples"] * 3, data.emoji)
    assert sheet.width > 2 * 4 * 64  # two captions, and for each three samples and the real one


def test_a_shorter_run_warms_up_for_the_same_fraction() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    steps, warmup = config["trainer"]["max_steps"] // 10, config["model"]["init_args"]["learning_rate"]["warmup_steps"]
    shorter = scaled(config, steps)
    assert shorter["trainer"]["max_steps"] == shorter["trainer"]["val_check_interval"] == steps
    assert shorter["model"]["init_args"]["learning_rate"]["warmup_steps"] == warmup // 10
