"""Samples image codes from a DALL-E, code by code, with a key/value cache.

Knows logits and randomness. Knows nothing of captions, pixels or files.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_dalle.errors import UserError
from lightning_dalle.hardware import has_native_bf16
from lightning_dalle.inference.config import SamplingOptions
from lightning_dalle.models.dalle import DALLE


def filter_logits(logits: Float[Tensor, "b k"], options: SamplingOptions) -> Float[Tensor, "b k"]:
    """Logits divided by the temperature, minus infinity where the options rule a code out.

    The threshold is on the logit as the model (guided) gives it, before the temperature.
    """
    scaled = logits / options.temperature
    if (options.min_logit, options.top_k, options.top_p) == (None, None, None):
        return scaled
    rejected = torch.zeros_like(logits, dtype=torch.bool)
    if options.min_logit is not None:
        rejected |= logits < options.min_logit
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        rejected |= scaled < scaled.topk(options.top_k).values[:, -1:]
    if options.top_p is not None:
        probability, order = scaled.softmax(-1).sort(descending=True)
        is_beyond = probability.cumsum(-1) - probability >= options.top_p  # what stands before suffices already
        rejected |= is_beyond.gather(-1, order.argsort(-1))
    rejected.scatter_(-1, logits.argmax(-1, keepdim=True), False)  # never nothing at all
    return scaled.masked_fill_(rejected, -torch.inf)


def draw(logits: Float[Tensor, "b k"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """One code a row by inversion: a multinomial draw whose randomness is one number in [0, 1)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (b, k)
    code = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return code.clamp(max=logits.shape[-1] - 1)


def uniforms(seeds: list[int], length: int) -> Tensor:
    """A row of `length` numbers in [0, 1) for each seed, (len(seeds), length), whatever stands beside it in a batch."""
    rows = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


ROWS, COLUMNS = 32, 384
"""Of a left factor in 16 bits on a CPU: with more rows of more columns an AMX's order of summation depends on how many
there are."""


class ByRows(nn.Linear):
    """A linear layer that multiplies at most `ROWS` rows at once, so that none hangs on how many stand beside it; as
    many in each product, so that none is left alone.
    """

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        if math.prod(x.shape[:-1]) <= ROWS:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)
        parts = [F.linear(part, self.weight, self.bias) for part in rows.tensor_split(math.ceil(len(rows) / ROWS))]
        return torch.cat(parts).unflatten(0, x.shape[:-1])


def in_native_bf16(model: DALLE) -> DALLE:
    """The same with weights of half the size where its device multiplies bf16 itself, else itself.

    On the CPUs that were tried a picture still hangs on its own seed alone: in bf16 oneDNN's sum of a row comes out the
    same to the last bit whatever rows stand beside it, if there is one, and of more than `COLUMNS` no more than `ROWS`.
    """
    device = model.start.device.type
    if not has_native_bf16(device):
        return model
    with torch.device("meta"):
        halved = DALLE(model.config)
        for parent in list(halved.modules()) if device == "cpu" else []:
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear) and child.in_features > COLUMNS:
                    setattr(parent, name, ByRows(child.in_features, child.out_features))
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    halved.load_state_dict(weights, assign=True)
    return halved.eval()


class Graph:
    """A step as one CUDA graph, which a GPU replays without waiting for Python to name its hundreds of kernels.

    Args:
        step: codes to logits; has run before, so that all that is made once is made.
        codes: of the shape and device that it is called with.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], codes: Int[Tensor, " b"]) -> None:
        self.codes = codes.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # records alone; nothing is computed and no cache moves on
            self.logits = step(self.codes)

    def __call__(self, codes: Int[Tensor, " b"]) -> Float[Tensor, "b k"]:
        self.codes.copy_(codes)
        self.graph.replay()
        return self.logits


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
    if b == 1 and device.type == "cpu":  # a row alone is multiplied by a kernel whose last bits are others
        two = None if given is None else given.repeat(2, 1)
        return sample(model, text_tokens.repeat(2, 1), seeds * 2, options, two, on_code)[:1]
    sets = 1 if options.guidance == 1.0 else 2  # with a caption, and without
    if sets == 2:
        text_tokens = torch.cat([text_tokens, model.null_caption(b)])
    codes = torch.empty(b, image_len, dtype=torch.long, device=device)  # what inference mode makes cannot be trained on
    n = 0 if given is None else given.shape[1]
    if given is not None:
        codes[:, :n] = given
    _fill(model, text_tokens, codes, n, uniforms(seeds, image_len).to(device), options, on_code)
    return codes.view(b, grid, grid)


@torch.inference_mode()  # a step of 8 pictures takes a CPU 5 % less than without gradients alone
def _fill(
    model: DALLE,
    text_tokens: Int[Tensor, "s t"],
    codes: Int[Tensor, "b i"],
    n: int,
    u: Float[Tensor, "b i"],
    options: SamplingOptions,
    on_code: Callable[[], None],
) -> None:
    """Draws all codes but the first n, by the numbers in u; captions are twice as many where the options guide."""
    image_len, sets = codes.shape[1], len(text_tokens) // len(codes)

    # What the pictures begin with is read once for all that share it: 512 candidates have one caption.
    known = torch.cat([text_tokens, codes[:, :n].repeat(sets, 1)], dim=1)
    begun, of = known.unique(dim=0, return_inverse=True)
    if len(begun) == 1:  # two at least, as above
        begun = begun.repeat(2, 1)
    logits, caches = model.begin(*begun.split([text_tokens.shape[1], n], dim=1))
    logits = logits[of]
    caches.take(of)

    step: Callable[[Tensor], Tensor] = lambda last: model.go_on(last.repeat(sets), caches)  # noqa: E731
    for i in range(n, image_len):
        if i > n:
            logits = step(codes[:, i - 1])
        if i == n + 1 and codes.device.type == "cuda":
            step = Graph(step, codes[:, i])
        logits = logits.float()  # (sets * b, k)
        if sets == 2:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + options.guidance * (conditional - unconditional)
        codes[:, i] = draw(filter_logits(logits, options), u[:, i])
        on_code()
    if not logits.isfinite().all():  # once, since looking makes a GPU wait; what is no number stays so to the end
        raise UserError("the transformer's logits are no numbers: it diverged in training")
