"""How alike two sets of images are, by torch-fidelity's own formulas on Inception features: FID, KID, precision and
recall, and the Inception Score.

Knows features. Knows nothing of images, files or models.
"""

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
from lightning_dalle.evaluation.protocol import FidelityOptions
from lightning_dalle.evaluation.statistics import share_of


def fidelity(generated: Features, reference: Features, options: FidelityOptions) -> dict[str, Any]:
    """FID, KID, precision, recall and, where there are logits, the Inception Score of the generated images.

    Each with what says how sure it is: KID's deviation between draws, that of the Inception Score between splits, that
    of FID under a bootstrap and a caution where there are too few images, intervals of 95 % (Wilson) of the shares.

    Raises:
        UserError: if there are fewer than four images on a side, too few for KID's draws, or too few for k neighbours.
    """
    counts = {"generated": len(generated.pool), "reference": len(reference.pool)}
    fewest = max(4, options.neighbours + 1)  # of fewer, KID's draws would be of one image, and no number
    for side, count in counts.items():
        if count < fewest:
            raise UserError(f"there are {count} {side} images, but the measures need at least {fewest}")
    frechet = _frechet(generated.pool, reference.pool)
    if not math.isfinite(frechet):
        raise UserError(f"FID of {counts['generated']} against {counts['reference']} images is {frechet}: look at them")
    subset = min(options.kid_subset_size, *(count // 2 for count in counts.values()))  # of all, draws would not differ
    kernel = kid_features_to_metric(
        generated.pool,
        reference.pool,
        kid_subsets=options.kid_subsets,
        kid_subset_size=subset,
        rng_seed=options.seed,
        verbose=False,
    )
    neighbours = prc_features_to_metric(
        generated.pool, reference.pool, prc_neighborhood=options.neighbours, save_cpu_ram=True, verbose=False
    )
    measured = {
        "images": counts,
        "fid": {
            "value": frechet,
            "deviation": _frechet_deviation(generated.pool, reference.pool, options),
            "caution": _caution(counts),
        },
        "kid": {
            "value": kernel["kernel_inception_distance_mean"],
            "deviation": kernel["kernel_inception_distance_std"],
            "subset_size": subset,
        },
        "precision": share_of(round(neighbours["precision"] * counts["generated"]), counts["generated"]),
        "recall": share_of(round(neighbours["recall"] * counts["reference"]), counts["reference"]),
    }
    measured["inception_score"] = _inception_score(generated, options)
    return measured


def _frechet(generated: Tensor, reference: Tensor) -> float:
    """FID. Fewer images than features leave most directions empty: it is then taken in a basis of the others, which
    changes nothing but the time that the eigenvalues take, from many seconds to none.
    """
    pools = [generated.double(), reference.double()]
    joined = torch.cat(pools)
    if len(joined) < joined.shape[1]:
        center = joined.mean(0)
        basis = torch.linalg.qr((joined - center).T).Q  # (features, images)
        pools = [(pool - center) @ basis for pool in pools]
    moments = [fid_features_to_statistics(pool) for pool in pools]
    return float(fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"])


def _frechet_deviation(generated: Tensor, reference: Tensor, options: FidelityOptions) -> float | None:
    if options.bootstrap < 2:
        return None
    generator = torch.Generator().manual_seed(options.seed)

    def redrawn(pool: Tensor) -> Tensor:
        return pool[torch.randint(len(pool), (len(pool),), generator=generator)]

    draws = [_frechet(redrawn(generated), redrawn(reference)) for _ in range(options.bootstrap)]
    return statistics.stdev(draws)


def _inception_score(generated: Features, options: FidelityOptions) -> dict[str, Any]:
    if generated.logits is None:
        return {"value": None, "refused": "the Inception weights lack the last layer it needs"}
    if len(generated.logits) < options.isc_splits:
        return {
            "value": None, "refused": f"{len(generated.logits)} images cannot be split into {options.isc_splits} parts"
        }  # fmt: skip
    score = isc_features_to_metric(generated.logits, options.isc_splits, shuffle=True, rng_seed=options.seed)
    return {
        "value": score["inception_score_mean"],
        "deviation": score["inception_score_std"],
        "splits": options.isc_splits,
    }


def _caution(counts: dict[str, int]) -> str | None:
    """FID falls as images are added, on either side (Chong and Forsyth 2020)."""
    few = {side: count for side, count in counts.items() if count < 10_000}
    if not few:
        return None
    named = " and ".join(f"{count} {side}" for side, count in few.items())
    return f"with {named} images FID is biased upwards; compare it only at these same counts"
