"""`evaluate` from the command line: real photos against real photos, and a user's mistakes."""

import json
from pathlib import Path

import pytest

from lightning_dalle.cli import main


@pytest.fixture
def folders(real_data: Path, tmp_path: Path) -> dict[str, Path]:
    """Six real photos against seven, and one file among them that is none."""
    sides = {}
    for side, split, count in (("made", "val", 6), ("real", "train", 7)):
        sides[side] = tmp_path / side
        sides[side].mkdir()
        for photo in sorted((real_data / "coco" / split).glob("*.jpg"))[:count]:
            (sides[side] / photo.name).write_bytes(photo.read_bytes())
    (sides["made"] / "broken.png").write_text("no picture")
    return sides


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features are kept from one protocol to the next where both prepare pictures alike."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("protocol", ["paper_blur", "clean_fid", "coco_zero_shot"])
def test_a_folder_is_scored_under_every_protocol(
    folders: dict[str, Path],
    pool_weights: Path,
    protocol: str,
    cache_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(
        ["evaluate", "--images", str(folders["made"]), "--reference", str(folders["real"]), "--protocol",
         f"configs/protocols/{protocol}.yaml", "--inception", str(pool_weights), "--out", str(tmp_path / "out"),
         "--cache_dir", str(cache_dir), *(["--protocol.fidelity.bootstrap", "2"])]
    )  # fmt: skip
    (file,) = (tmp_path / "out").glob("*.json")
    result = json.loads(file.read_text())
    assert result["protocol"]["name"] == protocol
    assert list(result["by_blur_radius"]) == (["0"] if protocol == "clean_fid" else ["0", "1", "2", "4", "8"])
    assert result["by_blur_radius"]["0"]["images"] == {"generated": 6, "reference": 7}
    assert result["by_blur_radius"]["0"]["fid"]["value"] > 0
    assert result["sets"]["generated"]["skipped"] == 1
    assert "broken.png" in result["sets"]["generated"]["first_skipped"]
    assert "\n\n- with 6 generated and 7 reference images FID is biased upwards" in capsys.readouterr().out
    main(["results", "--folder", str(tmp_path / "out")])
    assert f"{protocol}, folders, blur 0 | 6 against 7" in capsys.readouterr().out


def test_mistakes_are_sentences(
    folders: dict[str, Path], pool_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for more, sentence in (
        (["--images", str(tmp_path / "empty")], "empty holds no picture"),
        (["--images", str(tmp_path / "nowhere")], "there is no folder of pictures at"),
        (["--inception", "nowhere.pth"], "there are no Inception weights at nowhere.pth"),
        (["--batch_size", "0"], "batch_size is 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(
                ["evaluate", "--images", str(folders["made"]), "--reference", str(folders["real"]), "--protocol",
                 "configs/protocols/clean_fid.yaml", "--inception", str(pool_weights), "--out", str(tmp_path / "out"),
                 *more]
            )  # fmt: skip
        assert ended.value.code == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit):
        main(["results", "--folder", str(tmp_path / "empty")])
    assert "there are no results in" in capsys.readouterr().err
    (tmp_path / "empty" / "a.json").write_text('{"kind": "else"}')
    with pytest.raises(SystemExit):
        main(["results", "--folder", str(tmp_path / "empty")])
    assert "is no result of lightning_dalle" in capsys.readouterr().err
