"""The language of code and docs: docstrings that can be read alone, and the field's terms."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = sorted(Path("lightning_dalle").rglob("*.py"))
CODE = sorted([*PACKAGE, *Path("benchmarks").rglob("*.py"), *Path("evals").rglob("*.py"), *Path("tests").rglob("*.py")])
TEXTS = sorted(
    [*Path("docs").glob("*.md"), *Path().glob("*.md"), *Path("evals").glob("*.md"), *Path("configs").rglob("*.yaml"),
     *Path("notebooks").glob("*.ipynb"), *Path("evals").glob("*.ipynb")]
)  # fmt: skip

VERBS = set(
    "Accept Add Align Append Apply Assign Attend Average Build Cache Cast Center Change Check Choose Clip Close "  # noqa: SIM905
    "Cluster Collate Combine Compare Complete Compress Compute Configure Convert Copy Count Create Crop Cut Decode "
    "Decompress Describe Detect Disable Discard Divide Download Draw Drop Embed Enable Encode Enlarge Estimate "
    "Evaluate Exchange Expand Export Fill Filter Find Fit Flatten Forward Format Gather Generate Group Initialize "
    "Insert Join Keep Limit List Load Log Make Mark Mask Match Measure Merge Move Multiply Name Normalize Open "
    "Orthogonalize Pack Pad Parse Perform Permute Plan Plot Predict Prefill Prepare Print Process Prompt Quantize "
    "Raise Rank Read Record Reconstruct Register Reject Remove Render Reorder Replace Report Reproduce Rerank Rescale "
    "Reset Resize Resolve Restore Resume Return Round Run Sample Save Scale Score Select Send Serve Set Shard Show "
    "Shrink Shuffle Skip Sort Split Stack Start Step Stop Store Stream Sum Take Tokenize Train Transform Translate "
    "Try Unpack Unscale Update Use Validate Wait Warn Wrap Write Yield Map Invert Compile".split()
)
"""First words of a function's docstring. Add a verb that is missing; do not start with anything else."""

DEPENDENT = re.compile(
    r"(Of|That|Those|The same|The very same|As|And|What|Nothing|Such|Both of|Also|Likewise|By|In which)\b"
)
"""Openings of a docstring that can only be understood together with the line above it."""

BANNED = {
    r"pictures?\b": "image",
    r"\bhangs? on\b": "depends on",
    r"\b(go|goes|going|gone|went) on (from|with|where|behind|as)\b": "resume, continue",
    r"\bare no numbers?\b|\bis no number\b": "NaN or infinite",
    r"\bis there already\b": "already exists",
    r"\b(is|are) to be\b": "must be",
    r"\b(stands?|standing) beside\b": "say what is meant",
    r"\bpassed over\b|\bpass(es)? over\b": "skipped",
    r"\bat hand\b": "available",
    r"\bwhatever\b": "any",
    r"\bso (many|and so)\b": "n",
    r"\bKnows\b|\bknows nothing\b": "say what the module does",
    r"\bLightning's verbs?\b|\bsubverb": "subcommand",
    r"\bis told\b|\bare told\b": "raises, reports",
    r"\blet alone\b|\bwell-nigh\b": "plain words",
}
"""Phrases of a private dialect, each with what to write instead."""

ALLOWED = re.compile(
    r"data/filters/rules\.py|tests/data/filters/test_rules\.py"  # the words of boilerplate captions
    r"|test_plain_language\.py"
)


def docstrings(path: Path) -> Iterator[tuple[str, str, ast.AST]]:
    """Yield name, docstring and node of every documented module, class, function and attribute of a file."""

    def visit(node: ast.AST, name: str) -> Iterator[tuple[str, str, ast.AST]]:
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and (doc := ast.get_docstring(node)):
            yield name, doc, node
        body = getattr(node, "body", []) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else []
        for before, child in zip([None, *body], body, strict=False):
            is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if is_text and isinstance(child.value.value, str) and isinstance(before, ast.Assign | ast.AnnAssign):
                yield f"{name}:{child.lineno}", child.value.value, child
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(child, f"{name}.{child.name}")

    yield from visit(ast.parse(path.read_text()), path.stem)


def is_property(node: ast.AST) -> bool:
    names = {getattr(d, "id", getattr(d, "attr", "")) for d in getattr(node, "decorator_list", [])}
    return bool(names & {"property", "cached_property"})


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_every_module_has_a_docstring(path: Path) -> None:
    assert path.name == "__main__.py" or ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_a_functions_docstring_starts_with_a_verb(path: Path) -> None:
    wrong = [
        f"{name}: {doc.splitlines()[0]}"
        for name, doc, node in docstrings(path)
        if isinstance(node, ast.FunctionDef) and not is_property(node)
        if doc.split()[0].rstrip(",.;:") not in VERBS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_a_docstring_can_be_understood_alone(path: Path) -> None:
    wrong = [f"{name}: {doc.splitlines()[0]}" for name, doc, _ in docstrings(path) if DEPENDENT.match(doc)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [*CODE, *TEXTS], ids=str)
def test_the_fields_terms_are_used(path: Path) -> None:
    if ALLOWED.search(str(path)) or path.name == "LOG.md":
        return
    wrong = [
        f"{path}:{number}: {match[0]!r} (write: {instead}): {line.strip()[:100]}"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for phrase, instead in BANNED.items()
        if (match := re.search(phrase, line, re.IGNORECASE)) and "random.Random(" not in line  # seeds must not change
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", [path for path in TEXTS if path.suffix == ".md" and path.name != "LOG.md"], ids=str)
def test_no_line_of_the_docs_is_longer_than_120_columns(path: Path) -> None:
    wrong = [f"{path}:{n}" for n, line in enumerate(path.read_text().splitlines(), start=1) if len(line) > 120]
    assert not wrong, "\n".join(wrong)


def test_the_readme_is_short_and_shows_an_image_in_its_first_screen() -> None:
    text = Path("README.md").read_text()
    assert len(text.encode()) < 8 * 1024
    assert any(line.startswith("![") for line in text.splitlines()[:20])
