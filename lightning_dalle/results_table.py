"""JSON results of evaluations, read from files and shown as one Markdown table."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_dalle.errors import UserError

FORMAT = 2
"""Version of the JSON results, written at their top level as `format`; results of format 1 lack the key."""

HEADER = ("result", "what", "images", "FID", "KID x 1000", "Inception Score", "precision", "recall", "more")


def read_result(file: Path) -> dict[str, Any]:
    """Read a result, and check that `markdown_table` can show it.

    Raises:
        UserError: if the file is missing, is not a result, or has another format version.
    """
    if not file.is_file():
        raise UserError(f"there is no result at {file}: correct the path")
    try:
        result: dict[str, Any] = json.loads(file.read_text())
        found = result.get("format", 1)
        if found == FORMAT:
            _ = markdown_table({file.stem: result}), result["commit"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a result of test, evaluate or reproduce, choose another: {error!r}") from error
    if found != FORMAT:
        raise UserError(f"{file} has result format {found}, but format {FORMAT} is needed: repeat the evaluation")
    return result


def markdown_table(results: Mapping[str, dict[str, Any]]) -> str:
    """Return results by name as one Markdown table, with their warnings as a list below it."""
    rows, warnings = [], dict[str, None]()
    for name, result in results.items():
        for what, figures, more in _figures(result):
            rows.append((name, *_row(what, figures, more)))
            if figures is not None and figures["fid"].get("warning"):
                warnings[f"- {name}: {figures['fid']['warning']}"] = None
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADER, ("---",) * len(HEADER), *rows)]
    return "\n".join([*lines, "", *warnings]).rstrip()


def _figures(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None, str]]:
    """Yield what each row of a result shows, its figures, and the text of the last column."""
    kind = result["kind"]
    name = result["protocol"]["name"] if "protocol" in result else "openmoji"
    if kind == "recipe":
        dvae, composition = result["reconstruction"]["dvae"], result["composition"]
        more = (
            f"PSNR {dvae['psnr_db']['value']:.2f} dB, perplexity {dvae['codebook_perplexity']:.0f}, "
            f"retrieved {_percent(dvae['retrieval'])}; compositions right {_percent(composition['right_emoji'])}, "
            f"skin tone {_percent(composition['right_skin_tone'])}"
        )
        yield "the recipe's report", composition.get("fidelity"), more
    elif kind == "zero_shot":
        for num_candidates, measured in result["by_candidates"].items():
            for radius, figures in measured["by_blur_radius"].items():
                score = "" if measured["score"] is None else f"score {_number(measured['score'])}"
                yield f"{name}, best of {num_candidates}, blur {radius}", figures, score
    elif kind in ("reconstruction", "folders"):
        more = ""
        if kind == "reconstruction":
            more = f"PSNR {result['psnr_db']['value']:.2f} dB, SSIM {_number(result['ssim'])}"
        for radius, figures in result["by_blur_radius"].items():
            yield f"{name}, {kind}, blur {radius}", figures, more
    else:
        raise KeyError(f"unknown kind {kind}")


def _row(what: str, figures: dict[str, Any] | None, more: str) -> tuple[str, ...]:
    if figures is None:
        return (what, *[""] * 6, more)
    images = " against ".join(str(count) for count in figures["images"].values())
    kid = {name: 1000 * value for name, value in figures["kid"].items() if name in ("value", "std")}
    measures = (figures["fid"], kid, figures["inception_score"], figures["precision"], figures["recall"])
    return (what, images, *(_number(measure) for measure in measures), more)


def _number(measure: dict[str, Any]) -> str:
    """Return a measure with its standard deviation or 95 % confidence interval; empty if it was not measured."""
    value = measure["value"]
    if value is None:
        return ""
    text = f"{value:.2f}"
    if measure.get("std") is not None:
        text += f" ± {measure['std']:.2f}"
    if measure.get("ci95") is not None:
        low, high = measure["ci95"]
        text += f" ({low:.2f} to {high:.2f})"
    return text


def _percent(fraction: dict[str, Any]) -> str:
    low, high = fraction["ci95"]
    return f"{100 * fraction['value']:.1f} % ({100 * low:.0f} to {100 * high:.0f})"
