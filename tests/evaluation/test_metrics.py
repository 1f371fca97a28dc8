"""Measures on cases with a known answer."""

import pytest
import torch
from torch.testing import assert_close

from lightning_dalle.evaluation.kmeans import kmeans_reconstructions
from lightning_dalle.evaluation.metrics import CodebookPerplexity, NearestImages, psnr


def test_perplexity_is_one_at_collapse_and_the_codebook_at_even_use() -> None:
    collapsed, even = CodebookPerplexity(16), CodebookPerplexity(16)
    collapsed.update(torch.full((4, 2, 2), 3))
    even.update(torch.arange(16).view(4, 2, 2))
    assert float(collapsed.compute()) == pytest.approx(1.0)
    assert int(collapsed.num_unused) == 15
    assert float(even.compute()) == pytest.approx(16.0, rel=1e-5)
    assert int(even.num_unused) == 0


def test_codes_are_counted_over_all_batches() -> None:
    use = CodebookPerplexity(4)
    for code in range(4):
        use.update(torch.tensor([code]))
    assert float(use.compute()) == pytest.approx(4.0)


def test_psnr_is_that_of_the_mean_error() -> None:
    found = psnr([0.01, 0.03])
    assert found["value"] == pytest.approx(16.9897, abs=1e-3)
    assert found["ci95"][0] < found["value"] < found["ci95"][1]


def test_nearest_finds_each_noisy_original() -> None:
    references = torch.rand(20, 3, 8, 8)
    order = torch.randperm(20)
    assert torch.equal(NearestImages(references)(references[order] + 0.01 * torch.randn(20, 3, 8, 8), chunk=7), order)


def test_nearest_images_separates_what_float32_sums_cannot() -> None:
    references = torch.rand(1, 3, 32, 32).expand(200, -1, -1, -1).clone()
    references[:, 0, 0, 0] = torch.linspace(0.5, 0.501, 200)
    assert NearestImages(references)(references).tolist() == list(range(200))


def test_kmeans_is_exact_where_patches_are_fewer_than_codes() -> None:
    patches = torch.rand(5, 3, 2, 2)
    images = torch.cat([torch.cat([patches[i], patches[(i + 1) % 5]], dim=-1)[None] for i in range(5)])
    assert_close(kmeans_reconstructions(images, images, patch=2, codebook_size=5), images, atol=1e-5, rtol=0)


def test_kmeans_depends_only_on_its_seed() -> None:
    train, images = torch.rand(60, 3, 4, 4), torch.rand(4, 3, 4, 4)
    ours, same, other = (kmeans_reconstructions(train, images, 2, 16, max_patches=200, seed=s) for s in (3, 3, 4))
    assert torch.equal(ours, same)
    assert not torch.equal(ours, other)


def test_kmeans_starts_from_distant_patches() -> None:
    """Three colors, of which two fill one patch in 500: random initial centers would miss them."""
    colors = torch.tensor([0.0, 0.5, 1.0]).repeat_interleave(torch.tensor([998, 1, 1]))
    train = colors[:, None, None, None].expand(-1, 3, 2, 2)
    for seed in range(5):
        found = kmeans_reconstructions(train, train[-3:], patch=2, codebook_size=3, seed=seed)
        assert_close(found, train[-3:], atol=1e-4, rtol=0)
