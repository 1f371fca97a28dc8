"""Recipes that `reproduce` refuses before it trains their first stage."""

from pathlib import Path

import pytest

from lightning_dalle.commands.reproduce import reproduce
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.protocol import Captions, GenerationProtocol, Protocol, RerankingProtocol

VALID = Protocol(name="p", generation=GenerationProtocol(split="compositions"))
STAGES: dict[str, list[str]] = {"dvae": [], "dalle": []}


def test_a_recipe_without_the_required_stages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has the stages dvae, but must have dvae, dalle .*: change the key stages"):
        reproduce(tmp_path, {"dvae": []}, VALID)
    with pytest.raises(UserError, match="no stage clip: add the stage, or remove `reranking`"):
        reproduce(tmp_path, STAGES, VALID, RerankingProtocol())
    with pytest.raises(UserError, match=r"names the config lost\.yaml, but there is no such file: correct the path"):
        reproduce(tmp_path, {**STAGES, "dvae": ["--config", "lost.yaml"]}, VALID)


def test_a_protocol_that_does_not_fit_the_report_is_refused(tmp_path: Path) -> None:
    generation = GenerationProtocol(split="val", candidates=(1, 2), captions=Captions(csv=Path("list.csv")))
    expected = (
        r"the protocol p cannot be used by `reproduce`: its generation needs split: compositions \(is val\), "
        r"candidates: \[1\] \(is \[1, 2\]\) and no captions.csv \(is list.csv\); change these keys"
    )
    with pytest.raises(UserError, match=expected):
        reproduce(tmp_path, STAGES, Protocol(name="p", generation=generation))
