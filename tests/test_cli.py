"""User errors end with a message and exit code 2, no file is overwritten, and help does not import torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_dalle.cli import COMMANDS, main
from lightning_dalle.errors import UserError

PROMPTS = ["--prompts", '["a cat"]']


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(list(argv))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("", "usage"),
        ("--help", "usage"),
        ("generate --help", "usage"),
        ("data overlap --help", "usage"),
        ("data", "data overlap"),
        ("data --help", "data report"),
        ("gnerate", "unknown command 'gnerate'"),
        ("data reprot", "unknown command 'data reprot'; choose from data report, data overlap"),
        ("generate --chekpoint x", "chekpoint"),
        ("reproduce --run_dir x", "required: stages, protocol.name"),
        ("evaluate --images x", "required: reference, protocol.name"),
        ("convert --encodr x", "encodr"),
        ("fit --config nowhere.yaml", "'nowhere.yaml'; correct its path or its YAML"),
        ("validate --config=nowhere.yaml", "cannot read the config nowhere.yaml"),
        ("fit --config README.md", "the config README.md"),
        ("fit --config tests", "cannot read the config tests"),
        ("data report --config nowhere.yaml", "cannot read the config nowhere.yaml"),
    ],
)
def test_answers_without_torch(command: str, answer: str) -> None:
    code = (
        "import sys; from lightning_dalle.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'pytorch_lightning', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert answer in done.stdout + done.stderr


class UnreadableRecords(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise UserError("cannot read the image of record 0") from OSError("no such file")


def test_an_error_in_a_dataloader_worker_is_printed_without_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> None:
        """Load."""
        list(torch.utils.data.DataLoader(UnreadableRecords(), num_workers=1))

    monkeypatch.setitem(COMMANDS, "load", load)
    assert failure(capsys, "load") == "error: cannot read the image of record 0\n"


def test_fit_flushes_denormals_to_zero() -> None:
    torch.set_flush_denormal(False)
    smallest, one = torch.tensor(1e-45), torch.tensor(1.0)
    assert smallest * one > 0
    try:
        with pytest.raises(SystemExit):
            main(["fit", "--help"])
        assert smallest * one == 0
    finally:
        torch.set_flush_denormal(False)


def test_an_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    error = failure(capsys, "gnerate")
    assert "unknown command 'gnerate'; choose from reproduce, generate," in error


def test_a_misspelt_option_of_generate_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "chekpoint" in failure(capsys, "generate", "--chekpoint", "x.ckpt", *PROMPTS)


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--model.init_args.codebook_entropy_wieght=1", "codebook_entropy_weight"),
        ("--trainer.max_stepz=3", "max_steps"),
        ("--data.batchsize=3", "batch_size"),
        ("--model.init_args.config.n_hidd=8", "n_hid"),
    ],
)
def test_a_misspelt_key_of_fit_is_named_with_the_nearest_valid_key(
    capsys: pytest.CaptureFixture[str], option: str, nearest: str
) -> None:
    error = failure(capsys, "fit", "--config", "configs/openmoji/quickstart_dvae.yaml", option)
    assert option.split("=")[0].split(".")[-1] in error
    assert error.count(f"did you mean {nearest}?") == error.count("did you mean") == 1
    assert len(error.splitlines()) <= 2


@pytest.mark.parametrize(
    ("config", "option", "message"),
    [
        ("dalle", "--model.init_args.config.n_embd=33", "n_embd (33) must be a multiple of n_head (4)"),
        ("dvae", "--data.image_size=30", "image_size (30) must be a positive multiple of 4, the downsampling"),
        ("dalle", "--model.init_args.dvae_checkpoint=nowhere.ckpt", "there is no checkpoint at nowhere.ckpt: correct"),
    ],
)
def test_errors_of_config_classes_are_printed_without_jsonargparse_noise(
    capsys: pytest.CaptureFixture[str], config: str, option: str, message: str
) -> None:
    error = failure(capsys, "fit", "--config", f"configs/openmoji/quickstart_{config}.yaml", option)
    assert message in error
    assert "Namespace" not in error
    assert len(error) < 300


def test_one_prompt_needs_no_list(capsys: pytest.CaptureFixture[str]) -> None:
    error = failure(capsys, "generate", "--checkpoint", "x.ckpt", "--prompts", "a cat")
    assert "there is no checkpoint at x.ckpt: correct the path" in error


def test_conflicting_trainer_options_are_rejected_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", "configs/openmoji/clip.yaml", "--trainer.accelerator", "cpu"]
    error = failure(capsys, "fit", *config, "--trainer.precision", "32-true")
    assert "(an error of Lightning: correct the config, and remove its plugins with --trainer.plugins null)" in error
    assert "precision=32-true" in error
    error = failure(capsys, "fit", *config, "--trainer.strategy", "foo")
    assert "strategy='foo'" in error
    assert "plugins" not in error


def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml" in failure(capsys, "fit", "--config", "nowhere.yaml")


def test_a_missing_checkpoint_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    error = failure(capsys, "generate", "--checkpoint", "nowhere.ckpt", *PROMPTS)
    assert "there is no checkpoint at nowhere.ckpt: correct the path" in error


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken", b"trainer: 1", b"hello"])
def test_a_broken_checkpoint_is_rejected(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.ckpt"
    path.write_bytes(content)
    error = failure(capsys, "generate", "--checkpoint", str(path), *PROMPTS)
    assert f"cannot read {path} as a checkpoint: it was not written by torch.save, or is truncated; choose" in error


def test_a_checkpoint_that_would_run_code_is_rejected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    error = failure(capsys, "generate", "--checkpoint", str(tmp_path / "evil.ckpt"), *PROMPTS)
    assert f"cannot read {tmp_path}/evil.ckpt as a checkpoint: it contains objects that only code" in error
    assert not (tmp_path / "owned").exists()


def test_generate_rejects_a_dvae_checkpoint(capsys: pytest.CaptureFixture[str], dvae_checkpoint: Path) -> None:
    error = failure(capsys, "generate", "--checkpoint", str(dvae_checkpoint), *PROMPTS)
    assert f"a DALL-E checkpoint is needed, but {dvae_checkpoint} has only a dVAE: correct the path" in error


def test_generate_rejects_a_dvae_with_another_grid(
    capsys: pytest.CaptureFixture[str], dalle_checkpoint: Path, wide_dvae_checkpoint: Path
) -> None:
    error = failure(
        capsys, "generate", "--checkpoint", str(dalle_checkpoint), "--dvae", str(wide_dvae_checkpoint), *PROMPTS
    )
    assert f"grid is 4, but the dVAE in {wide_dvae_checkpoint} was trained with grid=8: choose another dVAE" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompts", '["a cat", "  "]'], "prompt 2 of 2 is empty: give it text"),
        (["--prompts", "[]"], "there is no prompt in --prompts: give at least one"),
        ([], "either --prompts or --prompt_file"),
        ([*PROMPTS, "--prompt_file", "x.txt"], "not both"),
        (["--prompt_file", "nowhere.txt"], "No such file or directory: 'nowhere.txt'): correct --prompt_file"),
        ([*PROMPTS, "--image", "nowhere.png"], "no image at nowhere.png: correct --image"),
        ([*PROMPTS, "--rows", "2"], "--rows 2 needs an image to complete: give --image"),
        ([*PROMPTS, "--paste", "true"], "--paste needs an image to complete: give --image"),
        ([*PROMPTS, "--top", "1"], "cannot choose the best 1 of 4 candidates without a scorer: give a CLIP"),
        ([*PROMPTS, "--top", "5"], "cannot keep 5 of 4 candidates: top must be from 1 to 4"),
        ([*PROMPTS, "--batch_size", "0"], "batch_size is 0, but must be at least 1"),
        ([*PROMPTS, "--clip", "nowhere.ckpt"], "there is no checkpoint at nowhere.ckpt: correct the path"),
        ([*PROMPTS, "--clip", "ViT-None:openai"], "open_clip has no model ViT-None"),
        ([*PROMPTS, "--num_candidates", "0"], "the number of candidates is 0, but must be at least 1"),
        ([*PROMPTS, "--sampling.temperature", "0"], "temperature is 0.0, but must be above 0"),
    ],
)
def test_bad_options_of_generate_raise_an_error_before_anything_is_written(
    capsys: pytest.CaptureFixture[str], dalle_checkpoint: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    out = tmp_path / "out"
    assert words in failure(capsys, "generate", "--checkpoint", str(dalle_checkpoint), "--out", str(out), *options)
    assert not out.exists()


@pytest.mark.parametrize("rows", ["0", "4"])
def test_an_image_prompt_must_leave_rows_to_sample(
    capsys: pytest.CaptureFixture[str], dalle_checkpoint: Path, image_file: Path, rows: str
) -> None:
    error = failure(
        capsys, "generate", "--checkpoint", str(dalle_checkpoint), *PROMPTS, "--image", str(image_file), "--rows", rows
    )
    assert f"cannot keep {rows} rows of a grid of 4: rows must be 1 to 3" in error


def test_a_broken_image_prompt_raises_an_error(
    capsys: pytest.CaptureFixture[str], dalle_checkpoint: Path, image_file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(image_file.read_bytes()[:60])
    error = failure(capsys, "generate", "--checkpoint", str(dalle_checkpoint), *PROMPTS, "--image", str(broken))
    assert f"cannot read {broken} as an image" in error
    assert "give another --image" in error


def test_generate_refuses_to_overwrite_images(
    capsys: pytest.CaptureFixture[str], dalle_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["generate", "--checkpoint", str(dalle_checkpoint), *PROMPTS, "--num_candidates=2", "--out", str(out)]
    main(arguments)
    written = [tmp_path / "out.png", *out.iterdir()]
    before = {path: path.read_bytes() for path in written}
    assert len([path for path in before if path.suffix == ".png"]) == 3
    assert len([path for path in before if path.suffix == ".json"]) == 2
    error = failure(capsys, *arguments)
    assert f"{out / '0000_a_cat_0000.png'} already exists: choose another --out than {out}" in error
    assert {path: path.read_bytes() for path in written} == before
    assert set(out.iterdir()) == set(written[1:])


def test_generate_records_the_rows_of_its_image_prompt(
    dalle_checkpoint: Path, image_file: Path, tmp_path: Path
) -> None:
    import json

    main(
        ["generate", "--checkpoint", str(dalle_checkpoint), *PROMPTS, "--num_candidates", "1",
         "--out", str(tmp_path / "out"), "--image", str(image_file), "--rows", "3"]
    )  # fmt: skip
    (record,) = (tmp_path / "out").glob("*.json")
    assert json.loads(record.read_text())["rows_kept"] == 3


def test_fit_rejects_a_dvae_with_another_image_size(
    capsys: pytest.CaptureFixture[str], dvae_checkpoint: Path, tmp_path: Path
) -> None:
    error = failure(
        capsys, "fit", "--config", "configs/openmoji/quickstart_dalle.yaml",
        "--model.init_args.dvae_checkpoint", str(dvae_checkpoint),
        "--trainer.logger.init_args.save_dir", str(tmp_path), "--trainer.max_steps", "1",
    )  # fmt: skip
    assert "was trained with image_size=16: set data.image_size to 16, or choose another dVAE" in error
    assert "image_size=16" in error


def test_fit_rejects_a_checkpoint_of_another_kind_of_model(
    capsys: pytest.CaptureFixture[str], dalle_checkpoint: Path, tmp_path: Path
) -> None:
    error = failure(
        capsys, "fit", "--config", "configs/openmoji/quickstart_dvae.yaml", "--ckpt_path", str(dalle_checkpoint),
        "--trainer.logger.init_args.save_dir", str(tmp_path),
    )  # fmt: skip
    assert (
        f"cannot load {dalle_checkpoint} into LitDVAE: it is not a dVAE checkpoint; choose another --ckpt_path" in error
    )


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_a_missing_ckpt_path_is_named(capsys: pytest.CaptureFixture[str], subcommand: str) -> None:
    error = failure(
        capsys, subcommand, "--config", "configs/openmoji/quickstart_dvae.yaml", "--ckpt_path", "nowhere.ckpt"
    )
    assert "no checkpoint at nowhere.ckpt: correct the path" in error


def test_generated_images_carry_the_attribution_of_the_training_images(dalle_checkpoint: Path, tmp_path: Path) -> None:
    import json

    from PIL import Image

    out = tmp_path / "out"
    main(["generate", "--checkpoint", str(dalle_checkpoint), *PROMPTS, "--num_candidates", "1", "--out", str(out)])
    for file in out.glob("*.png"):
        assert Image.open(file).info["Copyright"] == "Made from cats."
    (record,) = out.glob("*.json")
    assert json.loads(record.read_text())["attribution"] == "Made from cats."
