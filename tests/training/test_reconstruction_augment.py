"""Pictures as a model draws them, each where the image stands that it is nearest to."""

from pathlib import Path

import pytest
import torch

from lightning_dalle.errors import UserError
from lightning_dalle.training.reconstruction_augment import StandIns


def test_a_stand_in_takes_the_place_of_the_image_that_it_is_nearest_to(dvae_checkpoint: Path) -> None:
    stand_ins = StandIns(dvae_checkpoint=dvae_checkpoint, share=0.5)
    images = torch.rand(9, 3, 16, 16)
    seen = stand_ins(images, torch.Generator().manual_seed(0))
    changed = [i for i in range(9) if not torch.equal(seen[i], images[i])]
    assert 0 < len(changed) <= 5
    for i in changed:
        assert (seen[i] - images).square().sum((1, 2, 3)).argmin() == i
    assert torch.equal(seen, stand_ins(images, torch.Generator().manual_seed(0)))
    assert not torch.equal(seen, stand_ins(images, torch.Generator().manual_seed(1)))


def test_alone_an_image_is_replaced_by_its_own_draws(dvae_checkpoint: Path) -> None:
    image = torch.rand(1, 3, 16, 16)
    stand_ins = StandIns(dvae_checkpoint=dvae_checkpoint, share=1.0)
    seen = [stand_ins(image, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert not any(torch.equal(one, image) for one in seen)
    assert len({one.numpy().tobytes() for one in seen}) > 1


def test_a_dvae_of_another_size_is_refused(dvae_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"the data's image_size is 32, but the dVAE in .* image_size=16"):
        StandIns(dvae_checkpoint=dvae_checkpoint).check(32)
    with pytest.raises(UserError, match=r"the share of stand-ins is 0\.0, but must be above 0"):
        StandIns(dvae_checkpoint=dvae_checkpoint, share=0.0)
