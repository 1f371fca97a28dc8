"""Evaluation callbacks in `fit` and `test`, with shrunk configs of COCO and CUB on local data of the same schema."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from datasets import Dataset, DatasetDict, IterableDatasetDict
from PIL import Image
from pytorch_lightning.trainer.states import TrainerFn
from shrunk import add_scorer, shrunk, source_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_dalle.cli import main
from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.protocol import Protocol
from lightning_dalle.inference.pipeline import TextToImage
from lightning_dalle.training.callbacks.zero_shot import ZeroShotEvaluation
from lightning_dalle.training.lit_dalle import LitDALLE


@pytest.fixture(scope="session")
def birds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder like CUB: photos of several sizes, ten captions each as one text, splits train and test."""
    folder = tmp_path_factory.mktemp("birds")
    for split, count in (("train", 6), ("test", 5)):
        (folder / split).mkdir()
        lines = []
        for i in range(count):
            Image.effect_noise((40 + i, 36), 60).convert("RGB").save(folder / split / f"{i}.jpg")
            captions = [f"this bird number {i} has {j} stripes" for j in range(9)] + ["a small bird"]
            lines.append(json.dumps({"file_name": f"{i}.jpg", "description": "\n".join(captions)}))
        if split == "test":
            Image.new("RGB", (40, 36)).save(folder / split / "mute.jpg")
            lines.append(json.dumps({"file_name": "mute.jpg", "description": ""}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def scorer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that the tests start import the scorer."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def result_of(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())


def figures(result: dict[str, Any]) -> Any:
    return result["by_candidates"], result["reference"]


def test_fit_evaluates_its_samples(coco_run: Path) -> None:
    result = result_of(coco_run / "dalle" / "evaluation")
    assert result["captions"] == 6
    assert result["reference"]["images"] == 12
    measured = result["by_candidates"]["1"]["by_blur_radius"]["0"]
    assert measured["fid"]["value"] > 0
    assert "biased" in measured["fid"]["warning"]
    assert measured["inception_score"]["reason"]
    assert result["reference_images_in_training_data"] == {"value": 0, "of": 12}
    assert result["step"] == 4
    assert result["captions_with_reference_image"] == 6
    logged = EventAccumulator(str(coco_run / "dalle"), size_guidance={"images": 0}).Reload().Tags()
    assert "zero_shot_coco_in_training/fid_best_of_1_blur_0" in logged["scalars"]
    assert "zero_shot_coco_in_training/samples" in logged["images"]


def test_fit_evaluates_its_reconstructions(coco_run: Path) -> None:
    result = result_of(coco_run / "dvae" / "evaluation")
    assert result["images"] == 12
    assert 0 < result["psnr_db"]["ci95"][0] <= result["psnr_db"]["value"] <= result["psnr_db"]["ci95"][1]
    assert -1 <= result["ssim"]["value"] <= 1
    assert (result["lpips"]["value"] is None) == ("reason" in result["lpips"])
    assert 1 <= result["codebook_perplexity"]["value"] <= 16
    assert result["by_blur_radius"]["0"]["fid"]["value"] > 0
    logged = EventAccumulator(str(coco_run / "dvae")).Reload().Tags()
    assert "reconstruction_coco_reconstruction/rfid_blur_0" in logged["scalars"]


def test_a_clip_of_the_same_photos_ranks_samples(coco_run: Path) -> None:
    logged = EventAccumulator(str(coco_run / "clip")).Reload().Tags()
    assert {"train/loss", "val/image_to_text_r1", "val/text_to_image_r5"} <= set(logged["scalars"])
    best = TextToImage.from_pretrained(coco_run)("a cat", num_candidates=5, top=3)
    scores = [image.score for image in best]
    assert len(set(scores)) == 3
    assert scores == sorted(scores, reverse=True)


def test_cub_fits_and_is_tested_on_a_folder_of_its_shape(birds: Path, pool_weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for stage in ("dvae", "dalle"):
        config = shrunk(
            Path(f"configs/cub/{stage}.yaml"), run, birds, pool_weights, reference_count=5,
            **({"generation": {"captions": {"count": 4}}} if stage == "dalle" else {}),
        )  # fmt: skip
        main(["fit", "--config", str(config)])
    config = shrunk(
        Path("configs/cub/eval.yaml"), run, birds, pool_weights, blur_radii=[0], fidelity={},
        generation={"captions": {"unique": True, "count": 8}},
    )  # fmt: skip
    main(["test", "--config", str(config), "--ckpt_path", str(run / "dalle" / "checkpoints" / "last.ckpt")])
    result = result_of(run / "results")
    assert result["captions"] == 8
    refused = {"value": None, "reason": "the evaluation's training_source is not given"}
    assert result["reference_images_in_training_data"] == refused
    assert result["reference"] == {
        "data": str(birds), "split": "val", "images": 5, "skipped": 0, "first_skipped": {},
        "skipped_records": {"missing caption": 1},
    }  # fmt: skip
    assert len(list(Path(result["samples"]).glob("best_of_1/*.png"))) == 8


def eval_command(coco_run: Path, folder: Path, data: Path, weights: Path, *more: str, **protocol: Any) -> list[str]:
    config = shrunk(Path("configs/coco/eval.yaml"), folder, data, weights, **protocol)
    checkpoint = str(coco_run / "dalle" / "checkpoints" / "last.ckpt")
    return [sys.executable, "-m", "lightning_dalle", "test", "--config", str(config), "--ckpt_path", checkpoint, *more]


def test_test_sweeps_blur_radii_and_candidates(sweep_run: Path) -> None:
    result = result_of(sweep_run / "results")
    one, three = (result["by_candidates"][size] for size in ("1", "3"))
    assert one["score"]["value"] < three["score"]["value"]
    assert set(one["by_blur_radius"]) == {"0", "2"}
    assert one["by_blur_radius"]["0"]["inception_score"]["value"] >= 1
    assert result["model_metrics"]["val/bits_per_code"] > 0
    assert result["reference_images_in_training_data"] == {"value": 8, "of": 8}  # it says that it trained on val
    logged = EventAccumulator(str(sweep_run / "eval"), size_guidance={"images": 0}).Reload()
    assert {f"zero_shot_coco_zero_shot/{name}" for name in ("over_blur_radius", "over_candidates", "samples")} <= set(
        logged.Tags()["images"]
    )


def test_results_are_rendered_as_a_table(sweep_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["results", "--folder", str(sweep_run / "results")])
    table, told = capsys.readouterr().out.strip().split("\n\n")
    (name,) = (file.stem for file in (sweep_run / "results").glob("*.json"))
    assert told.startswith(f"- {name}: with 6 generated and 8 reference images FID is biased upwards")
    assert len(told.splitlines()) == 1
    head, rule, *lines = table.splitlines()
    assert {line.count("|") for line in (head, rule, *lines)} == {10}
    assert [line.split(" | ")[1] for line in lines] == [
        f"coco_zero_shot, best of {size}, blur {radius}" for size in (1, 3) for radius in (0, 2)
    ]
    assert "6 against 8" in lines[0]


def test_a_fit_in_two_processes_evaluates_too(
    coco_run: Path, real_data: Path, pool_weights: Path, tmp_path: Path
) -> None:
    config = shrunk(
        Path("configs/coco/dalle.yaml"), tmp_path / "run", real_data / "coco", pool_weights,
        reference_count=5, generation={"captions": {"count": 5}},
    )  # fmt: skip
    dvae = str(coco_run / "dvae" / "checkpoints" / "last.ckpt")
    command = [sys.executable, "-m", "lightning_dalle", "fit", "--config", str(config), "--trainer.devices", "2",
               "--trainer.strategy", "ddp", "--model.dvae_checkpoint", dvae]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "run" / "dalle" / "evaluation")["captions"] == 5


def test_two_processes_give_what_one_gives(coco_run: Path, real_data: Path, pool_weights: Path, tmp_path: Path) -> None:
    smaller = {"blur_radii": [0], "reference_count": 9, "fidelity": {}}
    smaller["generation"] = {"captions": {"count": 7}, "candidates": [1, 2]}
    results = []
    for name, more in (("one", []), ("two", ["--trainer.devices", "2", "--trainer.strategy", "ddp"])):
        command = eval_command(
            coco_run, tmp_path / name / "run", real_data / "coco", pool_weights, *more, **smaller
        )  # fmt: skip
        add_scorer(tmp_path / name / "run" / "eval.yaml")
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        results.append(result_of(tmp_path / name / "run" / "results"))
    one, two = results
    assert one["weights"] == two["weights"]
    assert one["captions"] == two["captions"] == 7
    assert figures(one)[1] == figures(two)[1]
    ours, theirs = (result["by_candidates"]["1"]["by_blur_radius"]["0"] for result in (one, two))
    assert ours["images"] == theirs["images"] == {"generated": 7, "reference": 9}
    assert ours["fid"]["value"] == pytest.approx(theirs["fid"]["value"], rel=1e-4)
    assert ours["kid"]["value"] == pytest.approx(theirs["kid"]["value"], rel=1e-4)
    assert one["by_candidates"]["2"]["score"] == two["by_candidates"]["2"]["score"]
    for name, value in one["model_metrics"].items():
        assert two["model_metrics"][name] == pytest.approx(value, rel=1e-5), name


def test_a_killed_evaluation_resumes(coco_run: Path, real_data: Path, pool_weights: Path, tmp_path: Path) -> None:
    smaller = {"blur_radii": [0], "reference_count": 8, "fidelity": {}, "generation": {"captions": {"count": 80}}}
    smaller["generation"]["candidates"] = [2]
    run = tmp_path / "run"
    command = eval_command(coco_run, run, real_data / "coco", pool_weights, **smaller)
    add_scorer(run / "eval.yaml", batch_size=4)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.time() + 200
    while len(list(run.glob("samples/*/best_of_2/*.png"))) < 16:
        assert process.poll() is None, "the process ended before it was killed"
        assert time.time() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in run.glob("samples/*/best_of_2/*.png")}
    assert 16 <= len(before) < 80
    assert not list(run.glob("results/*.json"))

    subprocess.run(command, check=True, capture_output=True, timeout=300)
    after = {path: path.stat().st_mtime_ns for path in run.glob("samples/*/best_of_2/*.png")}
    assert len(after) == 80
    assert {path: after[path] for path in before} == before, "an image was generated twice"
    broken = figures(result_of(run / "results"))
    for path in (*run.glob("results/*.json"), *after):
        path.unlink()
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert figures(result_of(run / "results")) == broken


def test_zero_shot_evaluation_refuses_a_dvae_and_missing_splits(
    coco_run: Path, real_data: Path, pool_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dvae = str(coco_run / "dvae" / "checkpoints" / "last.ckpt")
    dalle = str(coco_run / "dalle" / "checkpoints" / "last.ckpt")
    data = real_data / "coco"
    config = shrunk(Path("configs/coco/eval.yaml"), tmp_path, data, pool_weights, generation={"split": "test"})
    untrained = shrunk(Path("configs/coco/eval.yaml"), tmp_path / "untrained", data, pool_weights)
    add_scorer(untrained, training_source=source_config(data, val="validation"))
    for file, checkpoint, sentence in (
        (config, dvae, f"a DALL-E checkpoint is needed, but {dvae} has only a dVAE: correct the path"),
        (config, dalle, "the protocol coco_zero_shot uses the split test, but ... : set generation.split"),
        (untrained, dalle, "training_source of the evaluation needs a split train, but has val: correct it"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["test", "--config", str(file), "--ckpt_path", checkpoint])
        assert ended.value.code == 2
        error = " ".join(capsys.readouterr().err.split())
        assert all(part in error for part in sentence.split(" ... "))


@pytest.mark.parametrize("kind", ["streamed", "codes"])
def test_fit_without_image_rows_warns_that_it_skips_its_evaluation(kind: str, tmp_path: Path) -> None:
    evaluation = ZeroShotEvaluation(Protocol(name="p"), every_n_validations=1, inception=Path(__file__))
    codes = DatasetDict({"val": Dataset.from_dict({"captions": [["a"]], "codes": [[[1]]]})})
    splits = {"streamed": IterableDatasetDict({"val": codes["val"].to_iterable_dataset()}), "codes": codes}[kind]
    data = CaptionedImageDataModule(Held(splits))
    data.splits = splits
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = data  # type: ignore[attr-defined]
    with pytest.warns(
        UserWarning,
        match="skips the evaluation p, since the training data is streamed or has codes only: give",
    ):
        evaluation.setup(trainer, LitDALLE(), "fit")
    trainer.state.fn = TrainerFn.FITTING
    evaluation.on_validation_batch_end(trainer, pl.LightningModule(), None, None, batch_idx=0)
    assert evaluation.validations == 0
    with pytest.raises(UserError, match=r"the protocol p (cannot use|needs images, but) .*: set a.* `source`"):
        evaluation.setup(trainer, LitDALLE(), "test")


def test_a_fit_on_a_users_own_loader_counts_no_training_images() -> None:
    evaluation = ZeroShotEvaluation(Protocol(name="own_loader"))
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.state.fn = TrainerFn.FITTING
    found = evaluation._training_rows(trainer, pl.LightningModule())
    assert found == (None, "the evaluation's training_source is not given")


def test_fit_skips_its_evaluation_if_inception_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DALLE_INCEPTION", "none")
    evaluation = ZeroShotEvaluation(Protocol(name="p"), every_n_validations=1)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = CaptionedImageDataModule(Held(DatasetDict()))  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"this fit skips the evaluation p, since .LIGHTNING_DALLE_INCEPTION is none"):
        evaluation.setup(trainer, LitDALLE(), "fit")
    trainer.state.fn = TrainerFn.FITTING
    evaluation.on_validation_batch_end(trainer, pl.LightningModule(), None, None, batch_idx=0)
    assert evaluation.validations == 0
    with pytest.raises(UserError, match=r"but .LIGHTNING_DALLE_INCEPTION is none: unset it, or set it to a file"):
        evaluation.setup(trainer, LitDALLE(), "test")


def test_validate_neither_evaluates_nor_counts() -> None:
    evaluation = ZeroShotEvaluation(Protocol(name="p"), every_n_validations=2)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    counted = {}
    for trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.FITTING):
        evaluation.on_validation_batch_end(trainer, pl.LightningModule(), None, None, batch_idx=0)
        counted[trainer.state.fn] = evaluation.validations
    assert counted == {TrainerFn.VALIDATING: 0, TrainerFn.FITTING: 1}


@dataclass(frozen=True)
class Held:
    """Source with given splits."""

    splits: Any

    def load(self, image_size: int) -> Any:
        return self.splits
