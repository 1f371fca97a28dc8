"""Every command and subcommand reads a model from every form of file that this package writes, with equal results."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import dall_e.decoder
import dall_e.encoder
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lightning_dalle.checkpoints import load_dvae, read_checkpoint, resolve_checkpoint, weights_digest
from lightning_dalle.cli import main
from lightning_dalle.data.sources.encoded import read_encoding
from lightning_dalle.errors import UserError
from lightning_dalle.training.lit_clip import LitCLIP
from lightning_dalle.training.lit_dalle import LitDALLE
from lightning_dalle.training.lit_dvae import LitDVAE
from lightning_dalle.training.lit_module import LitModule

FORMS = ("lightning", "export", "convert", "release", "run")
"""Lightning checkpoint, safetensors file of `export` and of `convert`, folder of `export`, folder of `reproduce`."""
LONG = {"dvae": "dVAE", "dalle": "DALL-E", "clip": "CLIP"}


def images(out: Path) -> list[bytes]:
    return sorted(file.read_bytes() for file in (out / "samples").glob("*.png"))  # a CLIP changes their order


def release_files(out: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((out / "release").glob("*.safetensors"))]


def metrics(out: Path) -> list[tuple[str, str]]:
    (file,) = out.rglob("metrics.csv")
    *_, row = csv.DictReader(file.read_text().splitlines())
    return [(name, value) for name, value in row.items() if name.startswith("val/")]


def codes(out: Path) -> list[Any]:
    return [(read_encoding(file), pq.read_table(file)["codes"]) for file in (out / "codes").glob("*.parquet")]


def dvae_of_fit(out: Path) -> list[str]:
    return [weights_digest(load_dvae(file)) for file in out.rglob("last.ckpt")]


def last_step(out: Path) -> list[int]:
    return [read_checkpoint(file)["global_step"] for file in out.rglob("last.ckpt")]


class Action(NamedTuple):
    """Command that reads a model, and what it writes."""

    model: str
    argv: str
    result: Callable[[Path], list[Any]]


GENERATE = "generate --prompts cat --num_candidates 2 --out OUT/samples"
LIGHTNING = "--trainer.logger.init_args.save_dir OUT"
CSV = "--trainer.logger pytorch_lightning.loggers.CSVLogger --trainer.logger.save_dir OUT"
ACTIONS = {
    "generate --checkpoint": Action("dalle", f"{GENERATE} --checkpoint FILE", images),
    "generate --dvae": Action("dvae", f"{GENERATE} --checkpoint DALLE --dvae FILE", images),
    "generate --clip": Action("clip", f"{GENERATE} --checkpoint DALLE --clip FILE --top 1", images),
    "export --checkpoint": Action("dalle", "export --checkpoint FILE --clip CLIP --out OUT/release", release_files),
    "export --clip": Action("clip", "export --checkpoint DALLE --clip FILE --out OUT/release", release_files),
    "predict": Action("dvae", "predict --config OUT/encode.yaml --ckpt_path FILE", codes),
    "fit dvae_checkpoint": Action(
        "dvae",
        f"fit --config CONFIGS/dalle.yaml --model.dvae_checkpoint FILE --data.image_size SIZE --trainer.max_steps 1 "
        f"--model.learning_rate.warmup_steps 0 {LIGHTNING}",
        dvae_of_fit,
    ),
    **{
        f"{subcommand} {model}": Action(
            model, f"{subcommand} --config CONFIGS/{model}.yaml --ckpt_path FILE {LIMIT} {CSV}", metrics
        )
        for subcommand, LIMIT in (("validate", ""), ("test", "--trainer.limit_test_batches 2"))
        for model in LONG
    },
    **{
        f"fit --ckpt_path {model}": Action(
            model, f"fit --config CONFIGS/{model}.yaml --ckpt_path FILE --trainer.max_steps 13 {LIGHTNING}", last_step
        )
        for model in LONG
    },
}


@pytest.fixture(scope="module")
def files(tiny_run: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Return the file or folder of each form that contains a model; `convert` writes only a dVAE."""
    run, folder = tiny_run["dvae"].parent, tmp_path_factory.mktemp("forms")
    release, converted = folder / "release", folder / "openai.safetensors"
    main(["export", "--checkpoint", str(run), "--out", str(release)])
    shape = {"n_hid": 8, "n_blk_per_group": 1, "vocab_size": 32}  # as many codes as the tiny DALL-E
    torch.save(dall_e.encoder.Encoder(**shape), folder / "encoder.pkl")
    torch.save(dall_e.decoder.Decoder(**shape), folder / "decoder.pkl")
    pickles = ["--encoder", str(folder / "encoder.pkl"), "--decoder", str(folder / "decoder.pkl")]
    main(["convert", *pickles, "--image_size", "64", "--out", str(converted)])  # on the grid of the tiny DALL-E
    return {
        "lightning": {model: run / model / "checkpoints" / "last.ckpt" for model in LONG},
        "export": {model: release / f"{'clip' if model == 'clip' else 'dalle'}.safetensors" for model in LONG},
        "convert": dict.fromkeys(LONG, converted),
        "release": dict.fromkeys(LONG, release),
        "run": dict.fromkeys(LONG, run),
    }


@pytest.fixture(scope="module")
def results(
    files: dict[str, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], list[Any]]:
    """Return a function that runs an action on a form of file once, and returns its results."""
    known: dict[tuple[str, str], list[Any]] = {}

    def run(name: str, form: str) -> list[Any]:
        if (name, form) not in known:
            action, out = ACTIONS[name], tmp_path_factory.mktemp("out")
            config = yaml.safe_load(Path("configs/openmoji/encode.yaml").read_text())
            config["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
            config["trainer"]["logger"]["init_args"]["save_dir"] = str(out)
            config["trainer"]["callbacks"][0]["init_args"] = {"path": str(out / "codes"), "crops": {"val": 1}}
            (out / "encode.yaml").write_text(yaml.safe_dump(config))
            places = {
                "FILE": files[form][action.model], "DALLE": files["lightning"]["dalle"], "OUT": out,
                "CLIP": files["lightning"]["clip"], "CONFIGS": files["run"]["dvae"],
                "SIZE": 64 if form == "convert" else 32,
            }  # fmt: skip
            argv = action.argv
            for place, value in places.items():
                argv = argv.replace(place, str(value))
            main(argv.split())
            known[name, form] = action.result(out)
        return known[name, form]

    return run


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ACTIONS)
def test_every_command_reads_every_form(
    files: dict[str, dict[str, Path]],
    results: Callable[[str, str], list[Any]],
    capsys: pytest.CaptureFixture[str],
    name: str,
    form: str,
) -> None:
    model = ACTIONS[name].model
    path = files[form][model]
    message = None
    if form == "convert" and model != "dvae":
        message = f"a {LONG[model]} checkpoint is needed, but {path} has only a dVAE: correct the path"
    elif name.startswith("fit --ckpt_path") and form not in ("lightning", "run"):
        message = (
            f"cannot resume from {resolve_checkpoint(path, model)}: it has no training state (its key optimizer_states "
            f"is missing); start a new fit from its weights with --model.init_from {path}"
        )
    if message is not None:
        with pytest.raises(SystemExit) as ended:
            results(name, form)
        assert ended.value.code == 2
        assert f"error: {message}" in " ".join(capsys.readouterr().err.split())
    elif form == "convert":  # another dVAE than that of the other forms
        assert results(name, form)
        assert results(name, form) != results(name, "lightning")
    else:
        assert results(name, form)
        assert results(name, form) == results(name, "lightning")


class OwnDVAE(LitDVAE):
    """LightningModule of a user."""


def test_a_subclass_reads_every_form_as_its_base_class(
    files: dict[str, dict[str, Path]], results: Callable[[str, str], list[Any]], tmp_path: Path
) -> None:
    argv = ACTIONS["validate dvae"].argv.replace("CONFIGS", str(files["run"]["dvae"])).replace("OUT", str(tmp_path))
    argv = argv.replace("FILE", str(files["release"]["dvae"]))
    main([*argv.split(), "--model", f"{OwnDVAE.__module__}.OwnDVAE"])
    assert metrics(tmp_path) == results("validate dvae", "lightning")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "convert"])
@pytest.mark.parametrize("module", [LitDVAE, LitDALLE, LitCLIP])
def test_load_from_checkpoint_reads_every_form(
    files: dict[str, dict[str, Path]], module: type[LitModule], form: str
) -> None:
    loaded = module.load_from_checkpoint(files[form][module.kind])
    trained = read_checkpoint(files["run"][module.kind], module.kind)["state_dict"]
    torch.testing.assert_close(loaded.trained.state_dict(prefix=f"{module.kind}."), {
        name: weight for name, weight in trained.items() if name.startswith(f"{module.kind}.")
    }, rtol=0, atol=0)  # fmt: skip


def test_load_from_checkpoint_reads_a_converted_dvae_and_refuses_it_as_another_model(
    files: dict[str, dict[str, Path]],
) -> None:
    assert LitDVAE.load_from_checkpoint(files["convert"]["dvae"]).dvae.config.codebook_size == 32
    for module in (LitDALLE, LitCLIP):
        with pytest.raises(UserError, match="has only a dVAE"):
            module.load_from_checkpoint(files["convert"]["dvae"])


def test_a_release_is_evaluated_as_the_checkpoint_it_was_exported_from(
    files: dict[str, dict[str, Path]], pool_weights: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load(Path("configs/openmoji/eval.yaml").read_text())
    evaluation = config["trainer"]["callbacks"][0]["init_args"]
    protocol = yaml.safe_load(Path("configs/protocols/openmoji.yaml").read_text())
    protocol["generation"]["captions"] = {"count": 4}
    evaluation |= {"protocol": protocol, "training_source": None, "inception": str(pool_weights)}
    evaluation |= {f"{kind}_dir": str(tmp_path / kind) for kind in ("samples", "cache")}
    evaluation["scorer"] = {"class_path": "lightning_dalle.inference.scorers.load_scorer"}
    config["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    found = []
    for form in ("lightning", "release"):
        evaluation["results_dir"] = str(tmp_path / form)
        evaluation["scorer"]["init_args"] = {"name": str(files[form]["clip"])}
        (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config))
        main(["test", "--config", str(tmp_path / "eval.yaml"), "--ckpt_path", str(files[form]["dalle"])])
        (result,) = (tmp_path / form).glob("*_12.json")  # named after the step
        found.append(yaml.safe_load(result.read_text()))
    ours, theirs = found
    assert theirs["checkpoint"]["file"] == "dalle.safetensors"
    for key in ("step", "weights", "scorer", "by_candidates", "model_metrics"):
        assert ours[key] == theirs[key], key
