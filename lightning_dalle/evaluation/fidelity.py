"""FID, KID, precision, recall and the Inception Score, computed from Inception features by torch-fidelity."""

import math
import statistics
from typing import Any

import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.inception import Features
from lightning_dalle.evaluation.protocol import FidelityConfig
from lightning_dalle.evaluation.statistics import proportion


def fidelity_by_radius(
    generated: dict[int, Features], reference: dict[int, Features], config: FidelityConfig
) -> dict[str, Any]:
    """Return the figures of `fidelity` for each blur radius in pixels."""
    return {str(radius): fidelity(features, reference[radius], config) for radius, features in generated.items()}


def fidelity(generated: Features, reference: Features, config: FidelityConfig) -> dict[str, Any]:
    """Return FID, KID, precision, recall and, if the features include Inception's logits, the Inception Score.

    FID has its standard deviation over bootstrap resamples, KID over subsets and the Inception Score over splits.
    Precision and recall have Wilson's 95 % interval. With few images the FID entry has a warning.

    Raises:
        UserError: if there are fewer than max(4, `config.neighbours` + 1) generated or reference images, or if FID is
            NaN or infinite.
    """
    counts = {"generated": len(generated.pool), "reference": len(reference.pool)}
    fewest = max(4, config.neighbours + 1)  # with fewer, a subset of KID has one image and no variance
    for side, count in counts.items():
        if count < fewest:
            raise UserError(f"there are {count} {side} images, but FID and KID need at least {fewest}: add images")
    fid = _fid(generated.pool, reference.pool)
    if not math.isfinite(fid):
        raise UserError(
            f"FID of {counts['generated']} generated and {counts['reference']} reference images is {fid}: check both "
            "for images that are corrupt or all alike"
        )
    subset = min(config.kid_subset_size, *(count // 2 for count in counts.values()))
    kid = kid_features_to_metric(
        generated.pool,
        reference.pool,
        kid_subsets=config.kid_subsets,
        kid_subset_size=subset,
        rng_seed=config.seed,
        verbose=False,
    )
    prc = prc_features_to_metric(
        generated.pool, reference.pool, prc_neighborhood=config.neighbours, save_cpu_ram=True, verbose=False
    )
    return {
        "images": counts,
        "fid": {
            "value": fid,
            "std": _bootstrap_std(generated.pool, reference.pool, config),
            "warning": _warning(counts),
        },
        "kid": {
            "value": kid["kernel_inception_distance_mean"],
            "std": kid["kernel_inception_distance_std"],
            "subset_size": subset,
        },
        "precision": proportion(round(prc["precision"] * counts["generated"]), counts["generated"]),
        "recall": proportion(round(prc["recall"] * counts["reference"]), counts["reference"]),
        "inception_score": _inception_score(generated, config),
    }


def _fid(generated: Tensor, reference: Tensor) -> float:
    """Return FID; if there are fewer images than features, compute it in the images' span, which is exact and fast."""
    pools = [generated.double(), reference.double()]
    joined = torch.cat(pools)
    if len(joined) < joined.shape[1]:
        center = joined.mean(0)
        basis = torch.linalg.qr((joined - center).T).Q  # (features, images)
        pools = [(pool - center) @ basis for pool in pools]
    moments = [fid_features_to_statistics(pool) for pool in pools]
    return float(fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"])


def _bootstrap_std(generated: Tensor, reference: Tensor, config: FidelityConfig) -> float | None:
    if config.bootstrap < 2:
        return None
    generator = torch.Generator().manual_seed(config.seed)

    def resample(pool: Tensor) -> Tensor:
        return pool[torch.randint(len(pool), (len(pool),), generator=generator)]

    return statistics.stdev(_fid(resample(generated), resample(reference)) for _ in range(config.bootstrap))


def _inception_score(generated: Features, config: FidelityConfig) -> dict[str, Any]:
    if generated.logits is None:
        return {"value": None, "reason": "the Inception weights lack the last layer, which this score needs"}
    if len(generated.logits) < config.isc_splits:
        return {
            "value": None, "reason": f"{len(generated.logits)} images cannot be split into {config.isc_splits} parts: "
            "lower fidelity.isc_splits in the protocol",
        }  # fmt: skip
    score = isc_features_to_metric(generated.logits, config.isc_splits, shuffle=True, rng_seed=config.seed)
    return {"value": score["inception_score_mean"], "std": score["inception_score_std"], "splits": config.isc_splits}


def _warning(counts: dict[str, int]) -> str | None:
    """Return a warning if there are under 10,000 images, since few images bias FID (Chong and Forsyth 2020)."""
    few = {side: count for side, count in counts.items() if count < 10_000}
    if not few:
        return None
    named = " and ".join(f"{count} {side}" for side, count in few.items())
    return f"with {named} images FID is biased upwards; compare it only with FID at the same counts"
