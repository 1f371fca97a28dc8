"""`data report` on real photos and on streams, and its errors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_input import GOOD, BadRecord, noise_image, write_tars

from lightning_dalle.cli import main

FILTERS = [
    {"class_path": f"lightning_dalle.data.filters.{name}", "init_args": arguments}
    for name, arguments in {
        "rules.TooShort": {"min_words": 8},
        "language.NotEnglish": {},
        "rules.DuplicateCaptions": {"max_count": 2},
        "rules.AspectRatio": {"max_ratio": 1.5},
    }.items()
]


def config(folder: Path, data: Path, filters: list[dict[str, Any]] = FILTERS, **source: Any) -> Path:
    """Write the config of a fit, of which the report reads the data alone."""
    file = folder / "config.yaml"
    found = {
        "class_path": "lightning_dalle.data.sources.captioned.CaptionedImages",
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


def test_a_stream_is_filtered_by_the_caption_counts_that_the_report_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [BadRecord(noise_image(), text, None) for text in (GOOD, GOOD, GOOD, b"an owl", b"an owl")]
    write_tars(tmp_path / "data", [*good, BadRecord(b"", b"a fox", "empty image file")], shards=2)
    duplicates = {"class_path": "lightning_dalle.data.filters.rules.DuplicateCaptions", "init_args": {"max_count": 2}}
    options = {"streaming": True, "splits": {"train": "train"}}
    file = config(tmp_path, tmp_path / "data", [duplicates], **options)
    with pytest.raises(SystemExit, match="2"):
        main(["data", "report", "--config", str(file)])
    assert "cannot count streamed data: run `data report --caption_counts FILE`" in capsys.readouterr().err
    written = tmp_path / "counts.json"
    duplicates["init_args"]["file"] = str(written)
    file, out = config(tmp_path, tmp_path / "data", [duplicates], **options), tmp_path / "report.json"
    main(["data", "report", "--config", str(file), "--caption_counts", str(written), "--out", str(out)])
    assert json.loads(written.read_text())["captions"] == {GOOD.decode(): 3}
    counts = json.loads(out.read_text())["splits"]["train"]
    examples = counts.pop("examples")
    assert examples.keys() == {"duplicate caption", "empty image file"}
    assert examples["empty image file"] in capsys.readouterr().out
    assert counts == {"records": 6, "rejected": {"duplicate caption": 3, "empty image file": 1}, "kept": 2}
    main(["data", "report", "--config", str(file), "--limit", "4", "--out", str(out)])
    assert json.loads(out.read_text())["splits"]["train"]["records"] == 4


def test_the_name_of_a_rejected_record_is_printed_verbatim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.csv").write_text("path,caption\n[/x]lost:cat:.jpg,an owl\n[/x]lost:cat:.jpg,a fox\n")
    main(["data", "report", "--config", str(config(tmp_path, tmp_path / "p.csv", []))])
    assert "[/x]lost:cat:.jpg" in "".join(capsys.readouterr().out.replace("│", "").split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--config", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
        (["--config", "configs/coco/dvae.yaml", "--limit", "0"], "--limit is 0, but must be at least 1"),
        (["--config", "configs/coco/dvae.yaml", "--data.image_sise", "8"], "image_sise"),
        (
            ["--config", "configs/coco/dvae.yaml", "--data.source.init_args.path", "docs"],
            "cannot read captioned images from docs",
        ),
    ],
)
def test_wrong_options_are_reported(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["data", "report", *options])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from lightning_dalle.cli import main\n"
        "try: main(['data', 'report', '--help'])\n"
        "finally: assert not {'torch', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--caption_counts" in done.stdout
