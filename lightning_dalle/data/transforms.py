"""Pictures to tensors.

Knows PIL images of any size and mode. Knows nothing of captions or of where pictures come from.
"""

import torch
from torchvision.transforms import v2


def image_transform(image_size: int) -> v2.Transform:
    """A PIL image of any size and mode to float in [0, 1], its middle square."""
    return v2.Compose(
        [
            v2.RGB(),
            v2.Resize(image_size, antialias=True),
            v2.CenterCrop(image_size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
