"""`data report` on real photos and on streams, and its mistakes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_input import GOOD, BadRecord, picture, write_tars

from lightning_dalle.cli import main

FILTERS = [
    {"class_path": f"lightning_dalle.data.{name}", "init_args": arguments}
    for name, arguments in {
        "filters.TooShort": {"min_words": 8},
        "language.NotEnglish": {},
        "filters.CaptionFlood": {"max_count": 2},
        "filters.AspectRatio": {"largest": 1.5},
    }.items()
]


def config(folder: Path, data: Path, filters: list[dict[str, Any]] = FILTERS, **source: Any) -> Path:
    """Of a fit, of which nothing but the data is looked at."""
    file = folder / "config.yaml"
    found = {
        "class_path": "lightning_dalle.data.sources.captioned.CaptionedPictures",
        "init_args": {"path": str(data), **source},
    }
    file.write_text(yaml.safe_dump({"trainer": {"max_steps": 1}, "data": {"source": found, "filters": filters}}))
    return file


def test_real_photos_are_counted_by_split_and_reason(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = config(tmp_path, real_data / "coco"), tmp_path / "reports" / "coco.json"
    main(["data", "report", "--config", str(file), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "aspect ratio" in printed
    splits = json.loads(out.read_text())["splits"]
    assert {name: counts["records"] for name, counts in splits.items()} == {"train": 130, "val": 200}
    for counts in splits.values():
        assert sum(counts["rejected"].values()) + counts["kept"] == counts["records"]
        assert counts["rejected"]["aspect ratio"] > 0


def test_floods_of_a_stream_are_counted_by_the_report_that_the_filter_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [BadRecord(picture(), text, None) for text in (GOOD, GOOD, GOOD, b"an owl", b"an owl")]
    write_tars(tmp_path / "data", [*good, BadRecord(b"", b"a fox", "zero bytes")], shards=2)
    flood = {"class_path": "lightning_dalle.data.filters.rules.CaptionFlood", "init_args": {"max_count": 2}}
    options = {"streamed": True, "splits": {"train": "train"}}
    file = config(tmp_path, tmp_path / "data", [flood], **options)
    with pytest.raises(SystemExit, match="2"):
        main(["data", "report", "--config", str(file)])
    assert "streamed data are counted nowhere" in capsys.readouterr().err
    flood["init_args"]["file"] = str(tmp_path / "floods.json")
    file, out = config(tmp_path, tmp_path / "data", [flood], **options), tmp_path / "report.json"
    main(["data", "report", "--config", str(file), "--floods", str(tmp_path / "floods.json"), "--out", str(out)])
    assert json.loads((tmp_path / "floods.json").read_text())["captions"] == {GOOD.decode(): 3}
    counts = json.loads(out.read_text())["splits"]["train"]
    examples = counts.pop("examples")
    assert examples.keys() == {"caption flood", "zero bytes"}
    assert examples["zero bytes"] in capsys.readouterr().out
    assert counts == {"records": 6, "rejected": {"caption flood": 3, "zero bytes": 1}, "kept": 2}
    main(["data", "report", "--config", str(file), "--limit", "4", "--out", str(out)])
    assert json.loads(out.read_text())["splits"]["train"]["records"] == 4


def test_a_rejected_record_is_shown_by_its_name_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.csv").write_text("path,caption\n[/x]lost:cat:.jpg,an owl\n[/x]lost:cat:.jpg,a fox\n")
    main(["data", "report", "--config", str(config(tmp_path, tmp_path / "p.csv", []))])
    assert "[/x]lost:cat:.jpg" in "".join(capsys.readouterr().out.replace("│", "").split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config", "nowhere.yaml"], "the config nowhere.yaml cannot be read"),
        (["--config", "configs/coco/dvae.yaml", "--limit", "0"], "limit is 0"),
        (["--config", "configs/coco/dvae.yaml", "--data.image_sise", "8"], "image_sise"),
        (
            ["--config", "configs/coco/dvae.yaml", "--data.source.init_args.path", "docs"],
            "cannot be read from a folder",
        ),
    ],
)
def test_mistakes_are_sentences(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["data", "report", *options])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from lightning_dalle.cli import main\n"
        "try: main(['data', 'report', '--help'])\n"
        "finally: assert not {'torch', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--floods" in done.stdout
