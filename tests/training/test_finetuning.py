"""A fit starts from the weights, the tokenizer and the dVAE of a trained model."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_dalle.checkpoints import load_clip, load_dalle, load_dvae
from lightning_dalle.cli import main


@pytest.fixture
def exported(tiny_run: dict[str, Path], tmp_path: Path) -> Path:
    """Export the tiny run's DALL-E and CLIP."""
    run = tiny_run["dalle"].parent
    folder = tmp_path / "exported"
    clip = run / "clip" / "checkpoints" / "last.ckpt"
    main(["export", "--checkpoint", str(run / "dalle" / "checkpoints" / "last.ckpt"), "--clip", str(clip), "--out",
          str(folder)])  # fmt: skip
    return folder


def fit(tiny_run: dict[str, Path], stage: str, folder: Path, *more: str) -> Path:
    """Fit a stage for one step with a learning rate of 0 and an average that is not yet updated; return its checkpoint.

    The checkpoint contains the averaged weights, so the average must start from the trained weights too.
    """
    config = yaml.safe_load(tiny_run[stage].read_text())
    config["trainer"] |= {"max_steps": 1, "limit_val_batches": 0, "callbacks": config["trainer"]["callbacks"][-1:]}
    average = {"class_path": "pytorch_lightning.callbacks.EMAWeightAveraging", "init_args": {"update_every_n_steps": 9}}
    config["trainer"]["callbacks"].insert(0, average)
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    config["model"]["init_args"]["learning_rate"] = 0.0
    config["model"]["init_args"].pop("config")
    config["model"]["init_args"].pop("dvae_checkpoint", None)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(folder / "config.yaml"), *more])
    return folder / stage / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("stage", ["dvae", "clip"])
def test_a_dvae_and_a_clip_start_from_the_exported_weights(
    tiny_run: dict[str, Path], exported: Path, tmp_path: Path, stage: str
) -> None:
    tuned = fit(tiny_run, stage, tmp_path, "--model.init_from", str(exported))
    load = load_dvae if stage == "dvae" else load_clip
    for name, weight in load(exported).state_dict().items():
        assert torch.equal(weight, load(tuned).state_dict()[name])


@pytest.mark.parametrize("form", ["checkpoint", "safetensors", "export", "run"])
def test_a_dalle_starts_from_weights_tokenizer_and_dvae_of_every_form(
    tiny_run: dict[str, Path], exported: Path, tmp_path: Path, form: str
) -> None:
    run = tiny_run["dalle"].parent
    path = {
        "checkpoint": run / "dalle" / "checkpoints" / "last.ckpt", "safetensors": exported / "dalle.safetensors",
        "export": exported, "run": run,
    }[form]  # fmt: skip
    tuned, trained = load_dalle(fit(tiny_run, "dalle", tmp_path, "--model.init_from", str(path))), load_dalle(path)
    assert tuned.tokenizer.to_json() == trained.tokenizer.to_json()
    for ours, theirs in ((tuned.dalle, trained.dalle), (tuned.dvae, trained.dvae)):
        for name, weight in theirs.state_dict().items():
            assert torch.equal(weight, ours.state_dict()[name])


def test_new_words_get_new_tokens_that_start_from_the_mean(
    tiny_run: dict[str, Path], exported: Path, tmp_path: Path
) -> None:
    """The tiny tokenizer has 512 tokens of OpenMoji's captions; 600 continue it."""
    tuned = load_dalle(fit(tiny_run, "dalle", tmp_path, "--model.init_from", str(exported), "--data.vocab_size", "600"))
    trained = load_dalle(exported)
    assert (trained.tokenizer.bpe.get_vocab_size(), tuned.tokenizer.bpe.get_vocab_size()) == (512, 600)
    old, new = trained.dalle.text_embedding.weight, tuned.dalle.text_embedding.weight
    assert torch.equal(new[:512], old[:512])
    assert torch.allclose(new[512:600], old[:512].mean(0).expand(88, -1))
    assert torch.equal(new[600:], old[512:])


@pytest.mark.parametrize(
    ("stage", "option", "value", "sentence"),
    [
        (
            "dalle",
            "--data.vocab_size",
            "300",
            "text_vocab_size is 300, but its vocabulary has 512 tokens; set data.vocab_size",
        ),
        ("dalle", "--model.init_from", "nowhere", "there is no checkpoint at nowhere: correct the path"),
        ("clip", "--model.init_from", "DVAE", "a CLIP checkpoint is needed, but"),
    ],
)
def test_a_model_that_cannot_be_started_from_is_refused(
    tiny_run: dict[str, Path],
    exported: Path,
    tmp_path: Path,
    stage: str,
    option: str,
    value: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = value.replace("DVAE", str(tiny_run["dvae"].parent / "dvae" / "checkpoints" / "last.ckpt"))
    with pytest.raises(SystemExit) as ended:
        fit(tiny_run, stage, tmp_path, "--model.init_from", str(exported), option, value)
    assert ended.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
