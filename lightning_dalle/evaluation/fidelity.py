"""FID, KID, precision, recall and the Inception Score of Inception features, by torch-fidelity's own formulas."""

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
from lightning_dalle.evaluation.statistics import proportion_of


def fidelity_by_radius(
    generated: dict[int, Features], reference: dict[int, Features], config: FidelityConfig
) -> dict[str, Any]:
    """Return the figures of `fidelity` for each blur radius."""
    return {str(radius): fidelity(features, reference[radius], config) for radius, features in generated.items()}


def fidelity(generated: Features, reference: Features, config: FidelityConfig) -> dict[str, Any]:
    """Return FID, KID, precision, recall and, if there are logits, the Inception Score of the generated images.

    Each has its uncertainty: the standard deviation of FID over bootstrap resamples, of KID over subsets and of the
    Inception Score over splits; Wilson's 95 % interval of precision and recall. Few images add a warning to FID.

    Raises:
        UserError: if one side has fewer images than four or than neighbours + 1, or if FID is NaN or infinite.
    """
    counts = {"generated": len(generated.pool), "reference": len(reference.pool)}
    fewest = max(4, config.neighbours + 1)  # with fewer, a subset of KID has one image and no variance
    for side, count in counts.items():
        if count < fewest:
            raise UserError(f"there are {count} {side} images, but the measures need at least {fewest}")
    fid = _fid(generated.pool, reference.pool)
    if not math.isfinite(fid):
        raise UserError(
            f"FID of {counts['generated']} generated against {counts['reference']} reference images is {fid}: "
            "look at both sets of images"
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
        "precision": proportion_of(round(prc["precision"] * counts["generated"]), counts["generated"]),
        "recall": proportion_of(round(prc["recall"] * counts["reference"]), counts["reference"]),
        "inception_score": _inception_score(generated, config),
    }


def _fid(generated: Tensor, reference: Tensor) -> float:
    """Return FID, in the span of the images if they are fewer than features: the eigenvalues then take no time."""
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
            "value": None, "reason": f"{len(generated.logits)} images cannot be split into {config.isc_splits} parts"
        }  # fmt: skip
    score = isc_features_to_metric(generated.logits, config.isc_splits, shuffle=True, rng_seed=config.seed)
    return {
        "value": score["inception_score_mean"],
        "std": score["inception_score_std"],
        "splits": config.isc_splits,
    }


def _warning(counts: dict[str, int]) -> str | None:
    """Return a warning if few images bias FID: it falls as images are added (Chong and Forsyth 2020)."""
    few = {side: count for side, count in counts.items() if count < 10_000}
    if not few:
        return None
    named = " and ".join(f"{count} {side}" for side, count in few.items())
    return f"with {named} images FID is biased upwards; compare it only at these same counts"
