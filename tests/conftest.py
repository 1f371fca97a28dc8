"""Fixtures, and type and shape checks of every annotated function while the tests run."""

import functools
import os
from collections.abc import Iterator

# Two tests run at a time and start further processes. With one thread per core in each, threads would wait for each
# other at every barrier, about 50 times as long as they compute.
os.environ["OMP_NUM_THREADS"] = "1"

from jaxtyping import install_import_hook

install_import_hook("lightning_dalle", "beartype.beartype")  # before the first import of the package

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from docstring_parser.attrdoc import AttributeDocstrings  # noqa: E402
from shrunk import add_scorer, shrunk, source_config  # noqa: E402

from lightning_dalle.checkpoints import dalle_metadata, dvae_metadata  # noqa: E402
from lightning_dalle.models.dalle import DALLE, DALLEConfig  # noqa: E402
from lightning_dalle.models.dvae import DVAE, DVAEConfig  # noqa: E402
from lightning_dalle.models.transformer import TransformerConfig  # noqa: E402
from lightning_dalle.tokenizer import CaptionTokenizer  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def parsed_docstrings() -> Iterator[None]:
    """Parse the docstrings of each class once, which takes half of the time in which the command line is parsed."""
    parse = AttributeDocstrings.get_attr_docs
    cached = functools.cache(lambda component: parse(AttributeDocstrings(), component))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttributeDocstrings, "get_attr_docs", lambda self, component: cached(component))
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slow tests first, so that no process waits for another's at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def tiny_dalle(n_layer: int = 7, qk_norm: bool = False) -> DALLE:
    """Return a DALL-E with every kind of layer on a 4x4 grid, and weights so large that every position matters."""
    torch.manual_seed(0)
    config = DALLEConfig(
        transformer=TransformerConfig(n_layer=n_layer, n_head=2, n_embd=16, conv_kernel=3, qk_norm=qk_norm),
        text_len=6, text_vocab_size=20, grid=4, codebook_size=11,
    )  # fmt: skip
    dalle = DALLE(config).eval()
    for parameter in dalle.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return dalle


def render(mask: torch.Tensor) -> str:
    """Return a mask as text: one line per query, `#` where it sees a key."""
    return "\n".join("".join("#" if visible else "." for visible in line) for line in mask.tolist())


@pytest.fixture
def dalle() -> DALLE:
    return tiny_dalle()


@pytest.fixture
def text_tokens() -> torch.Tensor:
    return torch.tensor([[3, 1, 4, 1, 24, 25], [5, 9, 2, 6, 5, 3], [7, 21, 22, 23, 24, 25]])


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randint(11, (3, 16))


@pytest.fixture
def dvae() -> DVAE:
    return DVAE(DVAEConfig(image_size=16, codebook_size=11, n_group=3, n_block=1, n_hid=8, n_init=8)).eval()


def save(path: Path, record: dict[str, object], **models: torch.nn.Module) -> Path:
    """Write a checkpoint with the keys of a Lightning checkpoint."""
    weights = {f"{name}.{key}": value for name, model in models.items() for key, value in model.state_dict().items()}
    lightning = {"pytorch-lightning_version": "2.6.1", "global_step": 0, "optimizer_states": []}
    torch.save({"state_dict": weights, **lightning, **record}, path)
    return path


@pytest.fixture
def dvae_checkpoint(dvae: DVAE, tmp_path: Path) -> Path:
    return save(tmp_path / "dvae.ckpt", dvae_metadata(dvae), dvae=dvae)


@pytest.fixture
def wide_dvae_checkpoint(tmp_path: Path) -> Path:
    dvae = DVAE(DVAEConfig(image_size=32, codebook_size=11, n_group=3, n_block=1, n_hid=8, n_init=8))
    return save(tmp_path / "wide_dvae.ckpt", dvae_metadata(dvae), dvae=dvae)


@pytest.fixture
def dalle_checkpoint(dvae: DVAE, tmp_path: Path) -> Path:
    """Write an untrained DALL-E on the grid of `dvae`, with a byte tokenizer."""
    tokenizer = CaptionTokenizer.train(["a cat"], vocab_size=256, text_len=6)
    config = DALLEConfig(
        transformer=TransformerConfig(n_layer=3, n_head=2, n_embd=16, conv_kernel=3),
        text_len=6, text_vocab_size=256, grid=4, codebook_size=11,
    )  # fmt: skip
    dalle = DALLE(config)
    return save(
        tmp_path / "dalle.ckpt", dalle_metadata(dalle, dvae, tokenizer, "Made from cats."), dalle=dalle, dvae=dvae
    )


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    """Write a real image: the first emoji of the training data."""
    from lightning_dalle.data.sources.openmoji import OpenMoji

    path = tmp_path / "image.png"
    OpenMoji().load(32)["train"][0]["image"].save(path)
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train the configs of tests/tiny for a few steps; return the config of each stage, beside its run."""
    from lightning_dalle.cli import main

    folder = tmp_path_factory.mktemp("tiny_run")
    files = {}
    for stage in ("dvae", "dalle", "clip"):
        files[stage] = folder / f"{stage}.yaml"
        template = (Path(__file__).parent / "tiny" / f"{stage}.yaml").read_text()
        files[stage].write_text(template.replace("SAVE_DIR", str(folder)))
        main(["fit", "--config", str(files[stage])])
    return files


REAL_DATA = Path(os.environ.get("LIGHTNING_DALLE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
POOL_WEIGHTS = REAL_DATA / "inception" / "pt_inception-2015-12-05-pool-features.pth"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of photos and weights that the repo cannot ship; skip the test if it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real photos and weights at {REAL_DATA}; set $LIGHTNING_DALLE_TEST_DATA to their folder")
    return REAL_DATA


@pytest.fixture(scope="session")
def weights_if_any() -> Path | None:
    """Return Inception's real weights, or None if they are absent."""
    return POOL_WEIGHTS if POOL_WEIGHTS.is_file() else None


@pytest.fixture(scope="session")
def pool_weights(real_data: Path) -> Path:
    """Return Inception's real weights without the last layer."""
    return POOL_WEIGHTS


@pytest.fixture(scope="session")
def full_weights(pool_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write Inception's weights with a random last layer, which torch-fidelity and pytorch-fid expect."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.load(pool_weights, weights_only=True)
    weights["fc.weight"] = torch.randn(1008, 2048, generator=generator) * 0.1
    weights["fc.bias"] = torch.randn(1008, generator=generator)
    path = tmp_path_factory.mktemp("inception") / "full.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="session")
def coco_run(real_data: Path, pool_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train small versions of configs/coco on real photos, with evaluation; return the folder of the run."""
    from lightning_dalle.cli import main

    folder = tmp_path_factory.mktemp("coco") / "run"
    for stage in ("dvae", "dalle", "clip"):
        smaller = {"reference_count": 12}
        if stage == "dalle":
            smaller["generation"] = {"captions": {"count": 6}}
        config = shrunk(Path(f"configs/coco/{stage}.yaml"), folder, real_data / "coco", pool_weights, **smaller)
        main(["fit", "--config", str(config)])
    return folder


@pytest.fixture(scope="session")
def sweep_run(coco_run: Path, real_data: Path, full_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluate the run on two blur radii and two candidate counts; return the folder of the results."""
    from lightning_dalle.cli import main

    folder = tmp_path_factory.mktemp("sweep")
    config = shrunk(
        Path("configs/coco/eval.yaml"), folder, real_data / "coco", full_weights,
        preprocessing={"image_size": 32}, blur_radii=[0, 2], reference_count=8, fidelity={"isc_splits": 2},
        generation={"captions": {"count": 6}, "candidates": [1, 3]},
    )  # fmt: skip
    add_scorer(config, training_source=source_config(real_data / "coco", train="validation"))
    main(["test", "--config", str(config), "--ckpt_path", str(coco_run / "dalle" / "checkpoints" / "last.ckpt")])
    return folder
