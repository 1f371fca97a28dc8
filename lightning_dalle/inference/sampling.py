"""Samples image codes from a DALL-E, code by code, with a key/value cache.

Knows logits and randomness. Knows nothing of captions, pixels or files.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_dalle.errors import UserError
from lightning_dalle.inference.options import SamplingOptions
from lightning_dalle.models.dalle import DALLE


def filter_logits(logits: Float[Tensor, "b k"], options: SamplingOptions) -> Float[Tensor, "b k"]:
    """Logits divided by the temperature, minus infinity where the options rule a code out.

    The threshold is on the logit as the model (guided) gives it, before the temperature.
    """
    rejected = torch.zeros_like(logits, dtype=torch.bool)
    if options.min_logit is not None:
        rejected |= logits < options.min_logit
    logits = logits / options.temperature
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        rejected |= logits < logits.topk(options.top_k).values[:, -1:]
    if options.top_p is not None:
        probability, order = logits.softmax(-1).sort(descending=True)
        is_beyond = probability.cumsum(-1) - probability >= options.top_p  # what stands before suffices already
        rejected |= is_beyond.gather(-1, order.argsort(-1))
    rejected.scatter_(-1, logits.argmax(-1, keepdim=True), False)  # never nothing at all
    return logits.masked_fill(rejected, -torch.inf)


def draw(logits: Float[Tensor, "b k"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """One code a row by inversion: a multinomial draw whose randomness is one number in [0, 1)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (b, k)
    code = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return code.clamp(max=logits.shape[-1] - 1)


def uniforms(seeds: list[int], length: int) -> Tensor:
    """A row of `length` numbers in [0, 1) for each seed, (len(seeds), length), whatever stands beside it in a batch."""
    rows = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


@torch.no_grad()
def sample(
    model: DALLE,
    text_tokens: Int[Tensor, "b t"],
    seeds: list[int],
    options: SamplingOptions,
    given: Int[Tensor, "b n"] | None = None,
    on_code: Callable[[], None] = lambda: None,
) -> Int[Tensor, "b g g"]:
    """Codes of one picture for each caption.

    Args:
        model: in eval mode.
        text_tokens: captions, padded.
        seeds: one for each picture; the same seed and caption give the same picture in any batch.
        options: how each code is drawn.
        given: the first n codes of each picture in raster order, kept as they are: an image to complete.
        on_code: called after each drawn code, for a progress bar.

    Raises:
        UserError: if the model gives logits that are no numbers.
    """
    grid, image_len = model.config.grid, model.config.image_len
    device, b = text_tokens.device, len(text_tokens)
    is_guided = options.guidance != 1.0
    if is_guided:
        text_tokens = torch.cat([text_tokens, model.null_caption(b)])
    codes = torch.empty(b, image_len, dtype=torch.long, device=device)
    n = 0 if given is None else given.shape[1]
    if given is not None:
        codes[:, :n] = given
    u = uniforms(seeds, image_len).to(device)
    caches = model.transformer.new_caches()

    # What the pictures begin with is read once for all that share it: 512 candidates have one caption.
    known = torch.cat([codes[:, :n], codes[:, :n]]) if is_guided else codes[:, :n]
    begun, of = torch.cat([text_tokens, known], dim=1).unique(dim=0, return_inverse=True)
    begun_text, begun_codes = begun.split([text_tokens.shape[1], n], dim=1)
    unread = torch.cat([model.embed_text(begun_text), model.embed_codes(begun_codes)], dim=1)
    for i in range(n, image_len):
        logits = model.next_code(unread, caches).float()  # (b or 2b, k)
        if i == n:
            logits = logits[of]
            for cache in caches:
                cache.take(of)
        if is_guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + options.guidance * (conditional - unconditional)
        codes[:, i] = draw(filter_logits(logits, options), u[:, i])
        unread = model.embed_codes(torch.cat([codes[:, i : i + 1]] * (1 + is_guided)), i)
        on_code()
    if not logits.isfinite().all():  # once, since looking makes a GPU wait; what is no number stays so to the end
        raise UserError("the transformer's logits are no numbers: it diverged in training")
    return codes.view(b, grid, grid)
