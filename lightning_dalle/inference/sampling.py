"""Sampling of image codes from a DALL-E.

Sampling prefills the key/value cache with the prompt, then decodes one code per step.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_dalle.errors import UserError
from lightning_dalle.hardware import has_native_bf16
from lightning_dalle.inference.config import SamplingConfig
from lightning_dalle.models.dalle import DALLE
from lightning_dalle.models.kv_cache import KVCaches


def filter_logits(logits: Float[Tensor, "b k"], sampling: SamplingConfig) -> Float[Tensor, "b k"]:
    """Return the logits divided by the temperature, with -inf for codes that `sampling` excludes.

    `logit_threshold` is compared with the logits before that division.
    """
    scaled = logits / sampling.temperature
    if (sampling.logit_threshold, sampling.top_k, sampling.top_p) == (None, None, None):
        return scaled
    rejected = torch.zeros_like(logits, dtype=torch.bool)
    if sampling.logit_threshold is not None:
        rejected |= logits < sampling.logit_threshold
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        rejected |= scaled < scaled.topk(sampling.top_k).values[:, -1:]
    if sampling.top_p is not None:
        probability, order = scaled.softmax(-1).sort(descending=True)
        is_beyond = probability.cumsum(-1) - probability >= sampling.top_p  # the likelier codes alone reach top_p
        rejected |= is_beyond.gather(-1, order.argsort(-1))
    rejected.scatter_(-1, logits.argmax(-1, keepdim=True), False)  # the likeliest code is always left
    return scaled.masked_fill_(rejected, -torch.inf)


def sample_from_logits(logits: Float[Tensor, "b k"], uniform: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Return one code per row by inverting the cumulative distribution at a uniform number in [0, 1)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)  # (b, k)
    code = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    return code.clamp(max=logits.shape[-1] - 1)


def uniforms(seeds: list[int], length: int) -> Tensor:
    """Return uniform numbers in [0, 1) of shape (len(seeds), length); each row depends only on its seed."""
    rows = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


MAX_ROWS, MAX_COLUMNS = 32, 384
"""Limits up to which a CPU multiplies each row of a bf16 matrix independently of the number of rows. If both are
exceeded, AMX units sum in an order that depends on that number."""


class BatchInvariantLinear(nn.Linear):
    """Linear layer whose output for a row does not depend on the number of rows.

    It multiplies at most `MAX_ROWS` rows at once, in nearly equal parts: a single row would be rounded differently.
    """

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b e"]:
        if math.prod(x.shape[:-1]) <= MAX_ROWS:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)
        parts = [F.linear(part, self.weight, self.bias) for part in rows.tensor_split(math.ceil(len(rows) / MAX_ROWS))]
        return torch.cat(parts).unflatten(0, x.shape[:-1])


def to_native_bf16(model: DALLE) -> DALLE:
    """Return a copy with bf16 weights if the model's device multiplies bf16 natively, else the model itself.

    On a CPU, `BatchInvariantLinear` replaces wide linear layers, so that an image depends only on its prompt and seed.
    oneDNN then computes a row to the same bits for any number of rows above one (measured, not documented).
    """
    device = model.start.device.type
    if not has_native_bf16(device):
        return model
    with torch.device("meta"):
        bf16 = DALLE(model.config)
        for parent in list(bf16.modules()) if device == "cpu" else []:
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear) and child.in_features > MAX_COLUMNS:
                    setattr(parent, name, BatchInvariantLinear(child.in_features, child.out_features))
    weights = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    bf16.load_state_dict(weights, assign=True)
    return bf16.eval()


class CUDAGraphStep:
    """Decode step recorded as one CUDA graph, whose replay saves the time in which Python launches kernels.

    Args:
        step: function from codes to logits; must have run once before, so that all its buffers exist.
        codes: example input, of the shape and device of all later inputs.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], codes: Int[Tensor, " b"]) -> None:
        self.codes = codes.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # records kernels without running them, so no cache advances
            self.logits = step(self.codes)

    def __call__(self, codes: Int[Tensor, " b"]) -> Float[Tensor, "b k"]:
        self.codes.copy_(codes)
        self.graph.replay()
        return self.logits


def prefill(
    model: DALLE, text_tokens: Int[Tensor, "c t"], prefix: Int[Tensor, "c n"]
) -> tuple[Float[Tensor, "c k"], KVCaches]:
    """Return the logits of the next code, and KV caches filled with each prompt and its first codes `prefix`.

    Equal rows are computed once, so 512 candidates of one prompt share one prefill.
    """
    rows, prefix_index = torch.cat([text_tokens, prefix], dim=1).unique(dim=0, return_inverse=True)
    if len(rows) == 1:  # the CPU kernel for a single row rounds differently
        rows = rows.repeat(2, 1)
    logits, caches = model.prefill(*rows.split([text_tokens.shape[1], prefix.shape[1]], dim=1))
    caches.reorder(prefix_index)
    return logits[prefix_index], caches


def sample_codes(
    model: DALLE,
    text_tokens: Int[Tensor, "b t"],
    seeds: list[int],
    sampling: SamplingConfig,
    prefix: Int[Tensor, "b n"] | None = None,
    on_code: Callable[[], None] = lambda: None,
) -> Int[Tensor, "b g g"]:
    """Sample the codes of one image per prompt; each depends only on its prompt, seed and prefix, not on its batch.

    Args:
        model: DALL-E in eval mode.
        text_tokens: tokens of the prompts, padded.
        seeds: seed of each image.
        sampling: settings that turn logits into codes.
        prefix: first codes of each image in raster order, which are kept to complete an image.
        on_code: callback after each decoded code, for a progress bar.

    Raises:
        UserError: if the logits contain NaN or infinite values.
    """
    b, device, grid, image_len = len(text_tokens), text_tokens.device, model.config.grid, model.config.image_len
    if b == 1 and device.type == "cpu":  # the CPU kernel for a single row rounds differently
        twice = None if prefix is None else prefix.repeat(2, 1)
        return sample_codes(model, text_tokens.repeat(2, 1), seeds * 2, sampling, twice, on_code)[:1]
    codes = torch.empty(b, image_len, dtype=torch.long, device=device)  # outside inference mode: usable in training
    n = 0 if prefix is None else prefix.shape[1]
    if prefix is not None:
        codes[:, :n] = prefix
    cfg_factor = 1 if sampling.guidance == 1.0 else 2
    if cfg_factor == 2:
        text_tokens = torch.cat([text_tokens, model.null_caption(b)])
    uniform = uniforms(seeds, image_len).to(device)
    with torch.inference_mode():  # 5 % faster than no_grad for a step of 8 images on a CPU
        logits, caches = prefill(model, text_tokens, codes[:, :n].repeat(cfg_factor, 1))
        step: Callable[[Tensor], Tensor] = lambda last: model.decode_step(last.repeat(cfg_factor), caches)  # noqa: E731
        for i in range(n, image_len):
            if i > n:
                logits = step(codes[:, i - 1])
            if i == n + 1 and device.type == "cuda":
                step = CUDAGraphStep(step, codes[:, i])
            logits = logits.float()  # (cfg_factor * b, k)
            if cfg_factor == 2:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + sampling.guidance * (conditional - unconditional)
            codes[:, i] = sample_from_logits(filter_logits(logits, sampling), uniform[:, i])
            on_code()
    if not logits.isfinite().all():  # only at the end: a check makes a GPU wait, and NaN stays in the cache
        raise UserError("the logits contain NaN or infinite values: training diverged, so use an earlier checkpoint")
    return codes.view(b, grid, grid)
