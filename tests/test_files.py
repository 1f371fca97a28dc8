"""Files: atomic writes, JSON without NaN, hashes and YAML errors."""

import hashlib
from pathlib import Path

import pytest

from lightning_dalle.errors import UserError
from lightning_dalle.files import atomic_write, make_folder, read_yaml, sha256, write_json


def test_json_with_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*result\.json: .*nan; check whether training diverged"):
        write_json(tmp_path / "result.json", {"fid": {"value": float("nan")}})
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(file) as partial:
        partial.write_text(f"half {1 / 0}")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file.txt", "old")]


def test_a_folder_is_written_atomically(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "out") as partial:
        partial.mkdir()
        (partial / "file").touch()
        assert not (tmp_path / "out").exists()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/file"]


def test_a_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot create the output folder .*/file/out \(.*\); choose another --out"):
        make_folder(tmp_path / "file" / "out")


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert sha256(tmp_path / "file") == hashlib.sha256(b"content").hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1", r"the config .*\.yaml contains \[1\]: replace it by a YAML mapping"),
        (b"a: [", r"cannot read the config .*\.yaml: while parsing.*; correct its path or its YAML"),
        (b"\xff\xfe\x00", r"cannot read the config .*\.yaml: "),
    ],
)
def test_a_config_that_is_not_a_mapping_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_yaml(tmp_path / "config.yaml")
