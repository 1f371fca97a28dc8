"""Reconstructions of a dVAE that replace training images."""

from pathlib import Path

import pytest
import torch

from lightning_dalle.errors import UserError
from lightning_dalle.training.reconstruction_augment import ReconstructionAugment


def test_a_reconstruction_replaces_its_nearest_image(dvae_checkpoint: Path) -> None:
    augment = ReconstructionAugment(dvae_checkpoint=dvae_checkpoint, fraction=0.5)
    images = torch.rand(9, 3, 16, 16)
    seen = augment(images, torch.Generator().manual_seed(0))
    changed = [i for i in range(9) if not torch.equal(seen[i], images[i])]
    assert 0 < len(changed) <= 5
    for i in changed:
        assert (seen[i] - images).square().sum((1, 2, 3)).argmin() == i
    assert torch.equal(seen, augment(images, torch.Generator().manual_seed(0)))
    assert not torch.equal(seen, augment(images, torch.Generator().manual_seed(1)))


def test_a_single_image_is_replaced_by_its_own_reconstructions(dvae_checkpoint: Path) -> None:
    image = torch.rand(1, 3, 16, 16)
    augment = ReconstructionAugment(dvae_checkpoint=dvae_checkpoint, fraction=1.0)
    seen = [augment(image, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert not any(torch.equal(one, image) for one in seen)
    assert len({one.numpy().tobytes() for one in seen}) > 1


def test_fractions_outside_0_to_1_are_rejected(dvae_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"reconstruction_augment.fraction is 0\.0, but must be above 0"):
        ReconstructionAugment(dvae_checkpoint=dvae_checkpoint, fraction=0.0)
