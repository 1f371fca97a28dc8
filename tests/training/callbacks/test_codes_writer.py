"""Codes written by `predict`: independent of the number of processes, and equivalent to training on images."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_dalle.checkpoints import load_dvae, weights_digest
from lightning_dalle.cli import main
from lightning_dalle.data.images.transforms import DVAEAugmentation, to_image
from lightning_dalle.data.loading.samplers import SampleIndex
from lightning_dalle.data.sources.encoded import EncodedImages
from lightning_dalle.data.sources.openmoji import OpenMoji

CROPS = {"train": 3, "val": 1}
AUGMENTATION = ["--data.augmentation", "lightning_dalle.data.images.transforms.DVAEAugmentation"]


def encode(tiny_run: dict[str, Path], codes: Path, *more: str, checkpoint: Path | None = None) -> None:
    config = yaml.safe_load(Path("configs/openmoji/encode.yaml").read_text())
    config["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(codes.parent)
    config["trainer"]["callbacks"][0]["init_args"] |= {"path": str(codes), "crops": CROPS, "shard_size": 800}
    config["data"]["augmentation"] = {"class_path": "lightning_dalle.data.images.transforms.DVAEAugmentation"}
    file = codes.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    checkpoint = checkpoint or tiny_run["dvae"].parent / "dvae/checkpoints/last.ckpt"
    main(["predict", "--config", str(file), "--ckpt_path", str(checkpoint), *more])


@pytest.fixture(scope="module")
def codes(tiny_run: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoded") / "codes"
    encode(tiny_run, folder)
    return folder


def fit(tiny_run: dict[str, Path], folder: Path, codes: Path | None, *more: str) -> Path:
    """Train the tiny DALL-E on argmax codes of augmented emoji, from images or codes, in epochs of five steps."""
    source = ["--data.source", "lightning_dalle.data.sources.encoded.EncodedImages", "--data.source.path", str(codes)]
    main(
        ["fit", "--config", str(tiny_run["dalle"]), "--trainer.logger.init_args.save_dir", str(folder),
         "--model.soft_targets", "false", "--trainer.limit_train_batches", "5", "--trainer.val_check_interval", "4",
         "--trainer.log_every_n_steps", "1", *AUGMENTATION, *(source if codes else []), *more]
    )  # fmt: skip
    return folder / "dalle"


def curve(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def failure(capsys: pytest.CaptureFixture[str], run: Any, *args: Any, **options: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*args, **options)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_written_codes_and_captions_match_the_images(tiny_run: dict[str, Path], codes: Path) -> None:
    images, encoded = OpenMoji().load(32), EncodedImages(path=str(codes)).load(32)
    assert [file.name.rsplit("-of-")[0] for file in sorted(codes.iterdir())] == [
        *(f"train-0000{i}" for i in range(5)), "val-00000",
    ]  # fmt: skip
    for split in ("train", "val"):
        assert encoded[split]["captions"][:] == images[split]["captions"][:]
        assert encoded[split].column_names == ["captions", "id", "codes"]
    dvae = load_dvae(tiny_run["dvae"].parent / "dvae/checkpoints/last.ckpt")
    written = np.array(encoded["train"][1000:1064]["codes"])
    assert written.shape == (64, 3, 64)
    for crop in range(3):
        crops = torch.stack(
            [augmented(images["train"][record], SampleIndex(crop, record)) for record in range(1000, 1064)]
        )
        assert np.array_equal(written[:, crop], dvae.encode(crops).flatten(1).numpy())
    assert not np.array_equal(written[:, 0], written[:, 1])
    val_images = torch.stack([to_image(image, 32) for image in images["val"][:64]["image"]])
    assert np.array_equal(np.array(encoded["val"][:64]["codes"])[:, 0], dvae.encode(val_images).flatten(1).numpy())


def augmented(row: dict[str, Any], draw: SampleIndex) -> torch.Tensor:
    window = DVAEAugmentation()(np.asarray(row["image"].convert("RGB")), 32, draw.image_rng(seed=0))
    return to_image(Image.fromarray(window), 32)


def test_two_processes_write_each_missing_shard_once(tiny_run: dict[str, Path], codes: Path, tmp_path: Path) -> None:
    again = tmp_path / "codes"
    shutil.copytree(codes, again)
    lost = ["train-00001-of-00005.parquet", "train-00003-of-00005.parquet", "train-00004-of-00005.parquet"]
    for name in lost:
        (again / name).unlink()
    before = {file: file.stat().st_mtime_ns for file in again.iterdir()}
    encode(tiny_run, again, "--trainer.devices", "2", "--trainer.strategy", "ddp_fork")
    assert {file: file.stat().st_mtime_ns for file in again.iterdir() if file in before} == before
    assert {file.name for file in again.iterdir()} == {file.name for file in codes.iterdir()}
    ours, theirs = (EncodedImages(path=str(folder)).load(32)["train"] for folder in (again, codes))
    assert ours[:] == theirs[:]


def test_training_on_codes_equals_training_on_images(tiny_run: dict[str, Path], codes: Path, tmp_path: Path) -> None:
    """Train three epochs with BPE dropout, caption dropout and code corruption; resume in the middle of an epoch."""
    pixels = fit(tiny_run, tmp_path / "pixels", None)
    encoded = fit(tiny_run, tmp_path / "codes", codes)
    for tag in ("train/loss", "train/loss_image", "val/loss"):
        ours, theirs = curve(encoded, tag), curve(pixels, tag)
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert np.allclose([value for _, value in ours], [value for _, value in theirs], rtol=0, atol=1e-5), tag
    last = encoded / "checkpoints/last.ckpt"
    unbroken = torch.load(last)
    fit(tiny_run, tmp_path / "broken", codes, "--trainer.max_steps", "7")
    last = tmp_path / "broken/dalle/checkpoints/last.ckpt"
    fit(tiny_run, tmp_path / "broken", codes, "--ckpt_path", str(last))
    resumed = torch.load(last)
    assert resumed["tokenizer"] == unbroken["tokenizer"] == torch.load(pixels / "checkpoints/last.ckpt")["tokenizer"]
    assert resumed["attribution"] == OpenMoji.attribution
    for name, value in unbroken["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name


def other_dvae(tiny_run: dict[str, Path], tmp_path: Path) -> Path:
    """Write the trained dVAE with one layer changed."""
    checkpoint = torch.load(tiny_run["dvae"].parent / "dvae/checkpoints/last.ckpt")
    checkpoint["state_dict"]["dvae.encoder.blocks.input.weight"] += 1e-3
    torch.save(checkpoint, tmp_path / "other.ckpt")
    return tmp_path / "other.ckpt"


def test_codes_of_another_dvae_are_rejected_with_both_hashes(
    tiny_run: dict[str, Path], codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, theirs = other_dvae(tiny_run, tmp_path), EncodedImages(path=str(codes)).encoding.dvae
    error = failure(capsys, fit, tiny_run, tmp_path, codes, "--model.dvae_checkpoint", str(other))
    ours = weights_digest(load_dvae(other))
    assert f"the images of {codes} were encoded with dvae={theirs}, but the dVAE in {other} has dvae={ours}:" in error
    before = sorted(codes.iterdir())
    error = failure(capsys, encode, tiny_run, codes, checkpoint=other)
    assert f"was encoded with dvae={theirs}, but dvae={ours} is expected; remove the file, or use another" in error
    assert sorted(codes.iterdir()) == before


def test_settings_that_codes_do_not_support_are_rejected(
    tiny_run: dict[str, Path], codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = failure(capsys, fit, tiny_run, tmp_path, codes, "--model.soft_targets", "true")
    assert (
        "soft_targets needs the encoder's distribution, but the data contains only argmax codes; set model.soft_targets"
        in error
    )
    source = [
        *AUGMENTATION,
        "--data.source",
        "lightning_dalle.data.sources.encoded.EncodedImages",
        "--data.source.path",
    ]
    fit_dvae = ["fit", "--config", str(tiny_run["dvae"]), "--trainer.logger.init_args.save_dir", str(tmp_path)]
    error = failure(capsys, main, [*fit_dvae, *source, str(codes)])
    assert "LitDVAE needs images, but the batches have codes: give it data with images" in error
    error = failure(capsys, main, [*fit_dvae, *source, str(codes), "--data.image_size", "16"])
    assert f"{codes} were encoded with image_size=32, but the data has image_size=16: set data.image_size to" in error
    error = failure(capsys, main, [*fit_dvae, *source[2:], str(codes)])
    assert "the data has augmentation=None: set data.augmentation to DVAEAugmentation(), or encode them again" in error
    error = failure(
        capsys, fit, tiny_run, tmp_path, codes, "--data.filters", "[lightning_dalle.data.filters.rules.TooLong]"
    )
    assert "were encoded with filters=[], but the data has filters=[TooLong(max_characters=1000)]: set data." in error
    error = failure(capsys, fit, tiny_run, tmp_path, codes, "--data.seed", "1")
    assert f"the images of {codes} were encoded with seed=0, but the data has seed=1: set data.seed to 0" in error
    error = failure(capsys, main, [*fit_dvae, *source, str(tmp_path)])
    assert f"{tmp_path} contains no shards of codes; write them with `predict` and a dVAE" in error
