"""What a stream's positions leave behind for those that follow: keys and values, no more of them than will be seen.

Knows patterns, keys and values. Knows nothing of weights, layers or sampling.

A stream is begun in one pass over its text and the first of its image, and goes on position by position. All shapes of
such a step are the same at each position, and the position is a tensor, so that a step can be a CUDA graph.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_dalle.models.attention.dispatch import attend
from lightning_dalle.models.attention.patterns import Pattern


def width(pattern: Pattern) -> int:
    """The most image positions that one of them sees, itself included, or of `conv` those that they lie among."""
    return max(1, min(pattern.grid if pattern.kind == "column" else pattern.reach + 1, pattern.image_len))


class Window:
    """Where a layer keeps the image positions that one of them may see, in `width` slots after those of the text.

    A ring, in which each position takes the slot of the one that has gone out of sight; of `column` the column itself.

    Args:
        pattern: the layer's.
        dtype: of the keys.
        device: of the keys.
    """

    def __init__(self, pattern: Pattern, dtype: torch.dtype, device: torch.device) -> None:
        self.pattern, self.width = pattern, width(pattern)
        position = torch.arange(pattern.image_len)[:, None]  # (i, 1)
        slot = torch.arange(self.width)  # (w)
        if pattern.kind == "column":
            held, place = slot * pattern.grid + position % pattern.grid, position // pattern.grid
        else:
            held, place = position - (position - slot) % self.width, position % self.width
        is_seen = (held >= 0) & (held <= position) & pattern.near(position, held)
        hidden = torch.zeros(pattern.image_len, pattern.text_len + self.width)
        hidden[:, pattern.text_len :].masked_fill_(~is_seen, -torch.inf)
        self.places = (pattern.text_len + place).to(device)  # (i, 1)
        self.held = held.clamp(0, pattern.image_len - 1).to(device)  # (i, w)
        self.hidden = hidden.to(device, dtype)  # (i, t + w)

    def move(self, position: Int[Tensor, " 1"]) -> None:
        """To the image position that is read now."""
        self.position = position
        self.place = self.places.index_select(0, position)[0]  # (1), its slot
        self.seen = self.held.index_select(0, position)[0]  # (w), what the slots hold then
        self.bias = self.hidden.index_select(0, position)  # (1, t + w), added to the scores


class Kept:
    """The keys of a layer, or its values: those of the text, then of the window.

    Args:
        window: the layer's.
        begun: those of the stream so far.
    """

    def __init__(self, window: Window, begun: Float[Tensor, "b h s d"]) -> None:
        self.window = window
        text_len = window.pattern.text_len
        text, image = begun[:, :, :text_len], begun[:, :, text_len:]
        self.slots = torch.cat([text, text.new_zeros(*text.shape[:2], window.width, text.shape[3])], dim=2)
        self._begin(image)

    def _begin(self, image: Float[Tensor, "b h n d"]) -> None:
        last = image[:, :, -self.window.width :]
        n = image.shape[2]
        self.slots[:, :, self.window.places[n - last.shape[2] : n, 0]] = last

    def add(self, new: Float[Tensor, "b h 1 d"]) -> Float[Tensor, "b h s d"]:
        """Keeps those of the position that is read; returns all that its window has room for."""
        return self.slots.index_copy_(2, self.window.place, new)

    def take(self, of: Int[Tensor, " m"]) -> None:
        """Goes on with m streams, each beginning as the one that it is given the index of."""
        self.slots = self.slots[of]


class KeptByColumn(Kept):
    """All of the image are kept, since each column is seen again; those of one column lie beside the text at a time."""

    def _begin(self, image: Float[Tensor, "b h n d"]) -> None:
        b, h, n, d = image.shape
        self.image = image.new_zeros(b, h, self.window.pattern.image_len, d)
        self.image[:, :, :n] = image

    def add(self, new: Float[Tensor, "b h 1 d"]) -> Float[Tensor, "b h s d"]:
        self.image.index_copy_(2, self.window.position, new)
        self.slots[:, :, self.window.pattern.text_len :] = self.image.index_select(2, self.window.seen)
        return self.slots

    def take(self, of: Int[Tensor, " m"]) -> None:
        super().take(of)
        self.image = self.image[of]


class KVCache:
    """Keys and values of one layer."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.keys: Kept | None = None
        self.values: Kept | None = None

    def attend(
        self, q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"]
    ) -> Float[Tensor, "b h n d"]:
        """What the next n positions take from those that they see: the stream's beginning, then one at a time."""
        dtype = self.window.hidden.dtype
        if self.keys is None or self.values is None:
            kept = KeptByColumn if self.window.pattern.kind == "column" else Kept
            self.keys, self.values = kept(self.window, k.to(dtype)), kept(self.window, v.to(dtype))
            return attend(q, k, v, self.window.pattern)
        keys, values = self.keys.add(k.to(dtype)), self.values.add(v.to(dtype))  # (b, h, t + w, d)
        return F.scaled_dot_product_attention(q.to(dtype), keys, values, attn_mask=self.window.bias).to(q.dtype)

    def take(self, of: Int[Tensor, " m"]) -> None:
        """Goes on with m streams, each beginning as the one that it is given the index of."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.take(of)
        self.values.take(of)


class Caches:
    """A cache for each layer, and where all of them are in the image.

    Args:
        patterns: of the layers.
        like: what the layers read. A CPU's attention of one query is five times as fast in fp32 as in 16 bits.
    """

    def __init__(self, patterns: list[Pattern], like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32) if like.device.type == "cpu" else like.dtype
        self.windows = {pattern: Window(pattern, dtype, like.device) for pattern in set(patterns)}
        self.layers = [KVCache(self.windows[pattern]) for pattern in patterns]
        self.following: Int[Tensor, " 1"] = torch.full((1,), -patterns[0].text_len, device=like.device)

    def read(self, length: int) -> None:
        """Is told before the layers that they read so many more positions: the text at least, from then on one."""
        position = self.following.clone()
        self.following += length  # in place, as a CUDA graph has to find it
        if length == 1:
            for window in self.windows.values():
                window.move(position)

    def take(self, of: Int[Tensor, " m"]) -> None:
        """Goes on with m streams, each beginning as the one that it is given the index of."""
        for layer in self.layers:
            layer.take(of)
