"""Results as a table for people.

Knows the JSON that evaluations write.
"""

from collections.abc import Iterable, Iterator
from typing import Any

HEAD = ("result", "what", "images", "FID", "KID x 1000", "Inception Score", "precision", "recall", "more")


def markdown(lines: Iterable[tuple[str, ...]], cautions: Iterable[str] = ()) -> str:
    """Lines under the head, as Markdown; below them what is to be known of their figures."""
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (HEAD, ("---",) * len(HEAD), *lines))
    return "\n\n".join([table, "\n".join(f"- {caution}" for caution in cautions)]).rstrip()


def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A result as lines of the table, without the name of its file."""
    kind = result["kind"]
    name = result["protocol"]["name"] if "protocol" in result else "openmoji"
    if kind == "recipe":
        dvae, composition = result["reconstruction"]["dvae"], result["composition"]
        more = (
            f"PSNR {dvae['psnr_db']['value']:.2f} dB, perplexity {dvae['codebook_perplexity']:.0f}, "
            f"retrieved {percent(dvae['retrieval'])}; compositions right {percent(composition['right_emoji'])}, "
            f"skin tone {percent(composition['right_skin_tone'])}"
        )
        yield line("the recipe's report", composition.get("fidelity"), more)
    elif kind == "zero_shot":
        for size, measured in result["by_candidates"].items():
            for radius, figures in measured["by_blur_radius"].items():
                score = "" if measured["score"] is None else f"score {number(measured['score'])}"
                yield line(f"{name}, best of {size}, blur {radius}", figures, score)
    elif kind in ("reconstruction", "folders"):
        more = ""
        if kind == "reconstruction":
            more = f"PSNR {result['psnr_db']['value']:.2f} dB, SSIM {number(result['ssim'])}"
        for radius, figures in result["by_blur_radius"].items():
            yield line(f"{name}, {kind}, blur {radius}", figures, more)
    else:
        raise KeyError(f"kind {kind}")


def cautions(result: dict[str, Any]) -> list[str]:
    """What is to be known of a result's figures, each once."""
    sets = (result, *result.get("by_candidates", {}).values())
    figures = [measured for each in sets for measured in each.get("by_blur_radius", {}).values()]
    if result["kind"] == "recipe":
        figures.append(result["composition"].get("fidelity"))
    found = (measured["fid"].get("caution") for measured in figures if measured is not None)
    return list(dict.fromkeys(caution for caution in found if caution))


def line(what: str, figures: dict[str, Any] | None, more: str) -> tuple[str, ...]:
    """One line: measures with their deviation or interval."""
    if figures is None:
        return (what, *[""] * 6, more)
    images = " against ".join(str(count) for count in figures["images"].values())
    kid = {name: 1000 * value for name, value in figures["kid"].items() if name in ("value", "deviation")}
    measures = (figures["fid"], kid, figures["inception_score"], figures["precision"], figures["recall"])
    return (what, images, *(number(measure) for measure in measures), more)


def number(measure: dict[str, Any]) -> str:
    """A measure with what says how sure it is."""
    value = measure["value"]
    if value is None:
        return ""
    text = f"{value:.2f}"
    if measure.get("deviation") is not None:
        text += f" ± {measure['deviation']:.2f}"
    if measure.get("interval_95") is not None:
        low, high = measure["interval_95"]
        text += f" ({low:.2f} to {high:.2f})"
    return text


def percent(share: dict[str, Any]) -> str:
    """A share with its interval."""
    low, high = share["interval_95"]
    return f"{100 * share['value']:.1f} % ({100 * low:.0f} to {100 * high:.0f})"
