"""Parity of FID, KID and the Inception Score with torch-fidelity and pytorch-fid, on real photos and features."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_fidelity
from PIL import Image
from torchvision.transforms import v2

from lightning_dalle.errors import UserError
from lightning_dalle.evaluation.features import FeatureExtractor, FeatureSet, blur, images_in_folder, preprocess
from lightning_dalle.evaluation.fidelity import fidelity
from lightning_dalle.evaluation.inception import Features, Inception
from lightning_dalle.evaluation.protocol import FidelityConfig, ImagePreprocessing, Protocol

UNRESIZED = Protocol(name="unresized", preprocessing=ImagePreprocessing(image_size=None))
CONFIG = FidelityConfig(kid_subset_size=15)


@pytest.fixture(scope="module")
def photos(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write 50 COCO photos, 30 others and the 30 blurred at 299 pixels, to which pytorch-fid resizes differently."""
    root = tmp_path_factory.mktemp("photos")
    folders = {name: root / name for name in ("val", "train", "blurred")}
    for folder in folders.values():
        folder.mkdir()
    for split, count in (("val", 50), ("train", 30)):
        for path in sorted((real_data / "coco" / split).glob("*.jpg"))[:count]:
            with Image.open(path) as photo:
                image = preprocess(photo, ImagePreprocessing(image_size=299))
            v2.functional.to_pil_image(image).save(folders[split] / f"{path.stem}.png")
            if split == "train":
                v2.functional.to_pil_image(blur(image[None], 2)[0]).save(folders["blurred"] / f"{path.stem}.png")
    return folders


@pytest.fixture(scope="module")
def network(full_weights: Path) -> Inception:
    return Inception(full_weights)


@pytest.fixture(scope="module")
def sets(photos: dict[str, Path], network: Inception) -> dict[str, FeatureSet]:
    extractor = FeatureExtractor(network, UNRESIZED)
    return {name: extractor(images_in_folder(folder)) for name, folder in photos.items()}


def theirs(photos: dict[str, Path], generated: str, reference: str, weights: Path, **what: Any) -> dict[str, float]:
    return torch_fidelity.calculate_metrics(
        cache_root=str(photos[generated].parent / "cache"), input1_cache_name=generated, input2_cache_name=reference,
        input1=str(photos[generated]), input2=str(photos[reference]), feature_extractor_weights_path=str(weights),
        feature_extractor="inception-v3-compat", cuda=False, verbose=False,
        kid_subset_size=CONFIG.kid_subset_size, **what,
    )  # fmt: skip


@pytest.mark.parametrize("reference", ["train", "blurred"])
def test_equals_torch_fidelity(
    photos: dict[str, Path], sets: dict[str, FeatureSet], full_weights: Path, reference: str
) -> None:
    ours = fidelity(sets["val"].features[0], sets[reference].features[0], CONFIG)
    expected = theirs(photos, "val", reference, full_weights, fid=True, kid=True, isc=True, prc=True)
    assert ours["images"] == {"generated": 50, "reference": 30}
    assert ours["fid"]["value"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert ours["kid"]["value"] == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-3)
    assert ours["kid"]["std"] == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-3)
    assert ours["inception_score"]["value"] == pytest.approx(expected["inception_score_mean"], rel=1e-3)
    assert ours["inception_score"]["std"] == pytest.approx(expected["inception_score_std"], rel=1e-3)
    assert ours["precision"]["hits"] / 50 == pytest.approx(expected["precision"], abs=1 / 50)  # a tie may turn
    assert ours["recall"]["hits"] / 30 == pytest.approx(expected["recall"], abs=1 / 30)


def test_fid_equals_pytorch_fid(
    photos: dict[str, Path], sets: dict[str, FeatureSet], full_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytorch_fid import fid_score, inception

    monkeypatch.setattr(
        inception, "load_state_dict_from_url", lambda *args, **kwargs: torch.load(full_weights, weights_only=True)
    )
    network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    moments = {
        name: fid_score.compute_statistics_of_path(str(folder), network, 50, 2048, "cpu", num_workers=0)
        for name, folder in photos.items()
    }
    for reference in ("train", "blurred"):
        expected = fid_score.calculate_frechet_distance(*moments["val"], *moments[reference])
        ours = fidelity(sets["val"].features[0], sets[reference].features[0], CONFIG)["fid"]["value"]
        assert ours == pytest.approx(float(expected), rel=1e-3), reference


def test_blur_radius_0_changes_nothing_and_others_blur_the_images(
    photos: dict[str, Path], sets: dict[str, FeatureSet], network: Inception, tmp_path: Path
) -> None:
    for path in sorted(photos["train"].iterdir())[:8]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    swept = FeatureExtractor(network, replace(UNRESIZED, blur_radii=(0, 2)))(images_in_folder(tmp_path))
    torch.testing.assert_close(swept.features[0].pool, sets["train"].features[0].pool[:8], atol=1e-4, rtol=1e-4)
    of_blurred_files = sets["blurred"].features[0].pool[:8]  # blurred before they were written, as PNG
    torch.testing.assert_close(swept.features[2].pool, of_blurred_files, atol=1e-4, rtol=1e-4)


def test_fid_of_a_set_to_itself_is_zero(sets: dict[str, FeatureSet]) -> None:
    some = Features(sets["train"].features[0].pool[:, :64], None)  # with all 2,048 the eigenvalues take a while
    same = fidelity(some, some, CONFIG)
    assert same["fid"]["value"] == pytest.approx(0, abs=1e-4)
    assert same["precision"]["value"] == same["recall"]["value"] == 1.0


def test_the_bootstrap_gives_the_standard_deviation_of_fid(sets: dict[str, FeatureSet]) -> None:
    some, others = (Features(sets[name].features[0].pool[:, :64], None) for name in ("val", "train"))
    assert fidelity(some, others, CONFIG)["fid"]["std"] is None
    measured = fidelity(some, others, FidelityConfig(bootstrap=20))["fid"]
    assert 0 < measured["std"] < measured["value"]


def test_few_images_come_with_a_warning(sets: dict[str, FeatureSet]) -> None:
    some, others = (Features(sets[name].features[0].pool[:, :64], None) for name in ("val", "train"))
    warning = fidelity(some, others, CONFIG)["fid"]["warning"]
    assert warning.startswith("with 50 generated and 30 reference images FID is biased upwards")


def test_without_the_last_layer_only_the_inception_score_is_missing(
    photos: dict[str, Path], sets: dict[str, FeatureSet], pool_weights: Path, tmp_path: Path
) -> None:
    for path in sorted(photos["val"].iterdir())[:4]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    few = FeatureExtractor(Inception(pool_weights), UNRESIZED)(images_in_folder(tmp_path)).features[0]
    torch.testing.assert_close(few.pool, sets["val"].features[0].pool[:4], atol=1e-4, rtol=1e-4)
    assert few.logits is None
    some = few._replace(pool=few.pool[:, :64])
    refused = fidelity(some, some, FidelityConfig())["inception_score"]
    assert refused == {"value": None, "reason": "the Inception weights lack the last layer, which this score needs"}


def test_too_few_images_for_the_splits_of_the_inception_score() -> None:
    few = Features(torch.rand(8, 64), torch.randn(8, 1008))
    refused = fidelity(few, few, FidelityConfig())["inception_score"]
    assert refused == {
        "value": None,
        "reason": "8 images cannot be split into 10 parts: lower fidelity.isc_splits in the protocol",
    }


def test_too_few_images_for_the_measures() -> None:
    few, enough = Features(torch.rand(3, 2048), None), Features(torch.rand(8, 2048), None)
    with pytest.raises(UserError, match="there are 3 generated images, but FID and KID need at least 4: add images"):
        fidelity(few, enough, FidelityConfig())
    with pytest.raises(UserError, match="need at least 4"):
        fidelity(few, enough, FidelityConfig(neighbours=1))
