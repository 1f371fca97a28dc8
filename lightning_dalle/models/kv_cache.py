"""KV cache of a sequence: the keys and values that later positions will see, and no others.

Prefill stores the text and the first codes at once; each decode step then adds one position. All tensors of a step keep
their shapes and the position is a tensor, so that a step can be a CUDA graph.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_dalle.models.attention.dense import additive
from lightning_dalle.models.attention.patterns import Pattern


def cache_len(pattern: Pattern) -> int:
    """Return the number of image slots of a layer: the span of positions that one position sees, itself included."""
    return max(1, min(pattern.grid if pattern.image.column_major else pattern.lookback + 1, pattern.image_len))


class CacheLayout:
    """Assignment of image positions to cache slots, which follow the slots of the text.

    The slots form a ring: each position replaces one that is no longer visible. A column-major pattern holds the
    current column instead.

    Args:
        pattern: attention pattern of the layer.
        dtype: data type of the cached keys and values.
        device: device of the cache.
    """

    def __init__(self, pattern: Pattern, dtype: torch.dtype, device: torch.device) -> None:
        self.pattern, self.cache_len = pattern, cache_len(pattern)
        position = torch.arange(pattern.image_len)[:, None]  # (i, 1)
        slot = torch.arange(self.cache_len)  # (w)
        if pattern.image.column_major:
            held, own_slot = slot * pattern.grid + position % pattern.grid, position // pattern.grid
        else:
            held, own_slot = position - (position - slot) % self.cache_len, position % self.cache_len
        visible = (held >= 0) & (held <= position) & pattern.image.mask(position, held)
        visible = torch.cat([torch.ones(pattern.image_len, pattern.text_len, dtype=torch.bool), visible], dim=1)
        self.slots = (pattern.text_len + own_slot).to(device)  # (i, 1), slot of each position
        self.slot_positions = held.clamp(0, pattern.image_len - 1).to(device)  # (i, w), position in each image slot
        self.mask_bias = additive(visible.to(device), dtype)  # (i, t + w)

    def set_position(self, position: Int[Tensor, " 1"]) -> None:
        """Select the slot, the held positions and the mask of the image position that is decoded next."""
        self.position = position
        self.slot = self.slots.index_select(0, position)[0]  # (1)
        self.held_positions = self.slot_positions.index_select(0, position)[0]  # (w)
        self.bias = self.mask_bias.index_select(0, position)  # (1, t + w)


class KVBuffer:
    """Keys or values of one layer: the slots of the text, then those of the image.

    Args:
        layout: slots of the layer.
        prefilled: keys or values of the positions read so far, at least of the whole text.
    """

    def __init__(self, layout: CacheLayout, prefilled: Float[Tensor, "b h s d"]) -> None:
        self.layout = layout
        text_len = layout.pattern.text_len
        text, image = prefilled[:, :, :text_len], prefilled[:, :, text_len:]
        self.data = torch.cat([text, text.new_zeros(*text.shape[:2], layout.cache_len, text.shape[3])], dim=2)
        self._prefill_image(image)

    def _prefill_image(self, image: Float[Tensor, "b h n d"]) -> None:
        last = image[:, :, -self.layout.cache_len :]
        n = image.shape[2]
        self.data[:, :, self.layout.slots[n - last.shape[2] : n, 0]] = last

    def add(self, new: Float[Tensor, "b h 1 d"]) -> Float[Tensor, "b h s d"]:
        """Store the keys or values of the current position; return all slots."""
        return self.data.index_copy_(2, self.layout.slot, new)

    def reorder(self, index: Int[Tensor, " m"]) -> None:
        """Replace the batch by the sequences of these indices."""
        self.data = self.data[index]


class ColumnKVBuffer(KVBuffer):
    """Buffer of the whole image, since every column is read again; each step copies the current column to the slots."""

    def _prefill_image(self, image: Float[Tensor, "b h n d"]) -> None:
        b, h, n, d = image.shape
        self.image = image.new_zeros(b, h, self.layout.pattern.image_len, d)
        self.image[:, :, :n] = image

    def add(self, new: Float[Tensor, "b h 1 d"]) -> Float[Tensor, "b h s d"]:
        self.image.index_copy_(2, self.layout.position, new)
        self.data[:, :, self.layout.pattern.text_len :] = self.image.index_select(2, self.layout.held_positions)
        return self.data

    def reorder(self, index: Int[Tensor, " m"]) -> None:
        super().reorder(index)
        self.image = self.image[index]


class KVCache:
    """Key/value cache of one attention layer.

    Args:
        layout: slots of the layer.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self.layout = layout
        self.is_filled = False

    def prefill(self, k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"]) -> None:
        """Store the keys and values of the first s positions."""
        dtype = self.layout.mask_bias.dtype
        buffer = ColumnKVBuffer if self.layout.pattern.image.column_major else KVBuffer
        self.keys, self.values = buffer(self.layout, k.to(dtype)), buffer(self.layout, v.to(dtype))
        self.is_filled = True

    def update(
        self, k: Float[Tensor, "b h 1 d"], v: Float[Tensor, "b h 1 d"]
    ) -> tuple[Float[Tensor, "b h s d"], Float[Tensor, "b h s d"], Float[Tensor, "1 s"]]:
        """Store one more position; return the cached keys and values, and their additive mask."""
        dtype = self.layout.mask_bias.dtype
        return self.keys.add(k.to(dtype)), self.values.add(v.to(dtype)), self.layout.bias

    def reorder(self, index: Int[Tensor, " m"]) -> None:
        """Replace the batch by the sequences of these indices."""
        self.keys.reorder(index)
        self.values.reorder(index)


class KVCaches:
    """KV caches of all layers, and the position to decode next.

    Args:
        patterns: attention patterns of the layers.
        like: hidden states, whose device and data type the caches take. On a CPU they are at least fp32, in which
            attention of a single query is five times as fast as in 16 bits.
    """

    def __init__(self, patterns: list[Pattern], like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32) if like.device.type == "cpu" else like.dtype
        self.layouts = {pattern: CacheLayout(pattern, dtype, like.device) for pattern in set(patterns)}
        self.layers = [KVCache(self.layouts[pattern]) for pattern in patterns]
        self.next_pos: Int[Tensor, " 1"] = torch.full((1,), -patterns[0].text_len, device=like.device)

    def advance(self, length: int) -> None:
        """Move on by the positions that the layers read next: at least the text in prefill, then one per step."""
        position = self.next_pos.clone()
        self.next_pos += length  # in place, since a CUDA graph reads this tensor
        if length == 1:
            for layout in self.layouts.values():
                layout.set_position(position)

    def reorder(self, index: Int[Tensor, " m"]) -> None:
        """Replace the batch by the sequences of these indices."""
        for layer in self.layers:
            layer.reorder(index)
