"""KV caches of the transformer's layers, which keep only the keys and values that later positions will see.

Prefill stores the text and the first codes at once; each decode step then adds one position. The caches keep their
shapes and the position is a tensor, so that a decode step can be captured as a CUDA graph.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_dalle.models.attention.dense import additive
from lightning_dalle.models.attention.patterns import Pattern


def cache_len(pattern: Pattern) -> int:
    """Return the number of image positions that a layer caches: the span that one position sees, itself included."""
    return max(1, min(pattern.grid if pattern.column_major else pattern.lookback + 1, pattern.image_len))


class CacheLayout:
    """Assignment of image positions to the slots of a KV cache; the first slots belong to the text.

    The image slots form a ring buffer: each position replaces one that is no longer visible. In a column-major pattern
    they hold the column of the current position instead.
    """

    def __init__(self, pattern: Pattern, dtype: torch.dtype, device: torch.device) -> None:
        self.pattern, self.cache_len = pattern, cache_len(pattern)
        position = torch.arange(pattern.image_len)[:, None]  # (i, 1)
        slot = torch.arange(self.cache_len)  # (w)
        if pattern.column_major:
            held, own_slot = slot * pattern.grid + position % pattern.grid, position // pattern.grid
        else:
            held, own_slot = position - (position - slot) % self.cache_len, position % self.cache_len
        visible = (held >= 0) & (held <= position) & pattern.image_mask(position, held)
        visible = torch.cat([torch.ones(pattern.image_len, pattern.text_len, dtype=torch.bool), visible], dim=1)
        self.slots = (pattern.text_len + own_slot).to(device)  # (i, 1), slot of each position
        self.slot_positions = held.clamp(0, pattern.image_len - 1).to(device)  # (i, w), position in each image slot
        self.mask_bias = additive(visible.to(device), dtype)  # (i, t + w)

    def set_position(self, position: Int[Tensor, " 1"]) -> None:
        """Select the slot to write, the positions in all slots and the mask for the next image position to decode."""
        self.position = position
        self.slot = self.slots.index_select(0, position)[0]  # (1)
        self.held_positions = self.slot_positions.index_select(0, position)[0]  # (w)
        self.bias = self.mask_bias.index_select(0, position)  # (1, t + w)


class KVCache:
    """Key/value cache of one attention layer: the slots of the text, then those of the image.

    A column-major layer also stores the whole image, since each row reads every column again. At each step it copies
    the current column to the image slots.
    """

    def __init__(self, layout: CacheLayout) -> None:
        self.layout, self.is_filled = layout, False

    def prefill(self, k: Float[Tensor, "b h s d"], v: Float[Tensor, "b h s d"]) -> None:
        """Store the keys and values of the first s positions, which include the whole text."""
        layout = self.layout
        text, image = self._stack(k, v).tensor_split([layout.pattern.text_len], dim=3)
        _, b, h, n, d = image.shape
        self.slots = torch.cat([text, text.new_zeros(2, b, h, layout.cache_len, d)], dim=3)
        if layout.pattern.column_major:
            self.image = image.new_zeros(2, b, h, layout.pattern.image_len, d)
            self.image[:, :, :, :n] = image
        else:
            first = max(n - layout.cache_len, 0)
            self.slots[:, :, :, layout.slots[first:n, 0]] = image[:, :, :, first:]
        self.is_filled = True

    def update(
        self, k: Float[Tensor, "b h 1 d"], v: Float[Tensor, "b h 1 d"]
    ) -> tuple[Float[Tensor, "b h s d"], Float[Tensor, "b h s d"], Float[Tensor, "1 s"]]:
        """Store the next position; return the keys, values and additive mask of all slots."""
        layout = self.layout
        if layout.pattern.column_major:
            self.image.index_copy_(3, layout.position, self._stack(k, v))
            self.slots[:, :, :, layout.pattern.text_len :] = self.image.index_select(3, layout.held_positions)
        else:
            self.slots.index_copy_(3, layout.slot, self._stack(k, v))
        return self.slots[0], self.slots[1], layout.bias

    def reorder(self, index: Int[Tensor, " m"]) -> None:
        """Replace the cached sequences by those at `index`, such as one prompt's repeated for each candidate."""
        self.slots = self.slots.index_select(1, index)
        if self.layout.pattern.column_major:
            self.image = self.image.index_select(1, index)

    def _stack(self, k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"]) -> Float[Tensor, "2 b h n d"]:
        return torch.stack([k, v]).to(self.layout.mask_bias.dtype)


class KVCaches:
    """KV caches of all layers, and the next position to read, counted from the first image code.

    Args:
        patterns: attention patterns of the layers.
        like: hidden states, whose device and data type the caches take. On a CPU the caches use at least fp32, since
            attention of a single query takes five times as long in 16 bits.
    """

    def __init__(self, patterns: list[Pattern], like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32) if like.device.type == "cpu" else like.dtype
        self.layouts = {pattern: CacheLayout(pattern, dtype, like.device) for pattern in set(patterns)}
        self.layers = [KVCache(self.layouts[pattern]) for pattern in patterns]
        self.next_pos: Int[Tensor, " 1"] = torch.full((1,), -patterns[0].text_len, device=like.device)

    def advance(self, length: int) -> None:
        """Move `next_pos` by the number of positions to read: at least the text in prefill, one in a decode step."""
        position = self.next_pos.clone()
        self.next_pos += length  # in place, since a CUDA graph reads this tensor
        if length == 1:
            for layout in self.layouts.values():
                layout.set_position(position)

    def reorder(self, index: Int[Tensor, " m"]) -> None:
        """Replace the cached sequences by those at `index`, in all layers."""
        for layer in self.layers:
            layer.reorder(index)
