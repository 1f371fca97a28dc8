"""`evaluate` on real photos, and its error messages."""

import json
from pathlib import Path

import pytest
from PIL import Image

from lightning_dalle.cli import main


@pytest.fixture
def folders(real_data: Path, tmp_path: Path) -> dict[str, Path]:
    """Write six real photos, two of them as TIFF and GIF, a broken PNG and a text file, and seven other photos."""
    sides = {}
    for side, split, count in (("generated", "val", 6), ("real", "train", 7)):
        sides[side] = tmp_path / side
        sides[side].mkdir()
        for photo in sorted((real_data / "coco" / split).glob("*.jpg"))[:count]:
            (sides[side] / photo.name).write_bytes(photo.read_bytes())
    for photo, suffix in zip(sorted(sides["generated"].glob("*.jpg")), (".tiff", ".gif"), strict=False):
        Image.open(photo).save(photo.with_suffix(suffix))
        photo.unlink()
    (sides["generated"] / "broken.png").write_text("not an image")
    (sides["generated"] / "notes.txt").write_text("not an image")
    return sides


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("protocol", ["paper_blur", "clean_fid", "coco_zero_shot"])
def test_a_folder_is_scored_under_every_protocol(
    folders: dict[str, Path],
    pool_weights: Path,
    protocol: str,
    cache_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    main(
        ["evaluate", "--images", str(folders["generated"]), "--reference", str(folders["real"]), "--protocol",
         f"configs/protocols/{protocol}.yaml", "--inception", str(pool_weights), "--out", str(tmp_path / "out"),
         "--cache_dir", str(cache_dir), *(["--protocol.fidelity.bootstrap", "2"])]
    )  # fmt: skip
    (file,) = (tmp_path / "out").glob("*.json")
    result = json.loads(file.read_text())
    assert result["format"] == 2
    assert result["protocol"]["name"] == protocol
    assert list(result["by_blur_radius"]) == (["0"] if protocol == "clean_fid" else ["0", "1", "2", "4", "8"])
    assert result["by_blur_radius"]["0"]["images"] == {"generated": 6, "reference": 7}
    assert result["by_blur_radius"]["0"]["fid"]["value"] > 0
    assert result["sets"]["generated"] == {
        "folder": str(folders["generated"]), "images": 6, "skipped": 1,
        "first_skipped": {"broken.png": "unreadable image"}, "ignored": {".txt": 1},
    }  # fmt: skip
    assert "ignored 1 file that is not an image (1 .txt)" in caplog.text
    assert (
        f"\n\n- {file.stem}: with 6 generated and 7 reference images FID is biased upwards" in capsys.readouterr().out
    )
    main(["results", "--folder", str(tmp_path / "out")])
    assert f"{protocol}, folders, blur 0 | 6 against 7" in capsys.readouterr().out


def test_wrong_arguments_are_named(
    folders: dict[str, Path], pool_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for more, message in (
        (
            ["--images", str(tmp_path / "empty")],
            "empty contains no image and 0 other files: correct the path, or add images that end in",
        ),
        (["--images", str(tmp_path / "nowhere")], "nowhere: correct the path"),
        (["--inception", "nowhere.pth"], "there are no Inception weights at nowhere.pth: correct the path"),
        (["--batch_size", "0"], "batch_size is 0, but must be at least 1"),
        (["--out", str(tmp_path / "file")], "file: it is a file; choose a folder as --out"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(
                ["evaluate", "--images", str(folders["generated"]), "--reference", str(folders["real"]), "--protocol",
                 "configs/protocols/clean_fid.yaml", "--inception", str(pool_weights), "--out", str(tmp_path / "out"),
                 *more]
            )  # fmt: skip
        assert ended.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
