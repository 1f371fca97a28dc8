"""Features of folders and datasets: images that are read, skipped, ignored or refused, and the cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Features as Columns
from datasets import Image as EncodedImage
from PIL import Image

from lightning_dalle.data.images.decoding import decode_pil
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation import inception
from lightning_dalle.evaluation.features import (
    DistributedContext,
    FeatureExtractor,
    FeatureSet,
    ImageList,
    blur,
    images_in_dataset,
    images_in_folder,
    preprocess,
)
from lightning_dalle.evaluation.inception import Features, Inception, find_local_weights, find_or_download_weights
from lightning_dalle.evaluation.protocol import Captions, ImagePreprocessing, Protocol
from lightning_dalle.training.callbacks.evaluation import Evaluation


class MeanColors(Inception):
    """Replacement of Inception whose features are mean colors."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.sha256 = "0" * 64
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.seen = 0

    def features(self, images: torch.Tensor) -> Features:
        self.seen += len(images)
        return Features(images.float().mean((2, 3)).repeat(1, 683)[:, :2048], None)


def extract_features(
    images: ImageList, network: Inception, preprocessing: ImagePreprocessing, radii: tuple[int, ...] = (0,), **more: Any
) -> FeatureSet:
    protocol = Protocol(name="x", preprocessing=preprocessing, blur_radii=radii)
    return FeatureExtractor(network, protocol, **more)(images)


def read(folder: Path, *args: Any, **kwargs: Any) -> FeatureSet:
    return extract_features(images_in_folder(folder), *args, **kwargs)


@pytest.fixture
def network() -> MeanColors:
    return MeanColors()


def save_images(folder: Path, names: str, size: tuple[int, int] = (32, 32)) -> None:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", size, (i * 10, 100, 200)).save(folder / f"{name}.png")


def test_unreadable_images_are_named_and_the_others_read(network: Inception, tmp_path: Path) -> None:
    save_images(tmp_path, "abc")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
    (tmp_path / "bb.jpg").write_text("not an image")
    (tmp_path / "d.png").touch()
    found = read(tmp_path, network, ImagePreprocessing(image_size=32), batch_size=2)
    assert found.names == ["a.png", "c.png"]
    assert found.skipped == {"b.png": "unreadable image", "bb.jpg": "unreadable image", "d.png": "empty image file"}
    assert found.features[0].pool[:, 0].tolist() == [0, 20]


def test_tiff_avif_and_gif_are_read_and_other_files_counted(network: Inception, tmp_path: Path) -> None:
    for suffix in ("tiff", "tif", "avif", "gif", "webp", "bmp", "jpeg", "PNG"):
        Image.new("RGB", (32, 32), "white").save(tmp_path / f"{suffix}.{suffix}")
    for name in ("a.txt", "b.txt", "c", ".hidden"):
        (tmp_path / name).write_text("not an image")
    images = images_in_folder(tmp_path)
    assert images.ignored == {".txt": 2, "": 1}
    found = extract_features(images, network, ImagePreprocessing(image_size=32))
    assert len(found.names) == 8
    assert not found.skipped


def test_a_folder_is_read_once_under_one_protocol(network: MeanColors, tmp_path: Path) -> None:
    save_images(tmp_path / "set", "abc")
    cache, preprocessing = tmp_path / "cache", ImagePreprocessing(image_size=32)
    first = read(tmp_path / "set", network, preprocessing, (0, 1), cache_dir=cache)
    again = read(tmp_path / "set", network, preprocessing, (0, 1), cache_dir=cache)
    assert network.seen == 6
    assert again.names == first.names
    assert torch.equal(again.features[1].pool, first.features[1].pool)
    read(tmp_path / "set", network, ImagePreprocessing(image_size=16), (0, 1), cache_dir=cache)
    assert network.seen == 12
    save_images(tmp_path / "set", "d")
    assert len(read(tmp_path / "set", network, preprocessing, (0, 1), cache_dir=cache).names) == 4


def test_two_processes_read_each_image_once_and_both_return_all(network: MeanColors, tmp_path: Path) -> None:
    save_images(tmp_path / "set", "abcde")
    (tmp_path / "set" / "bb.jpg").write_text("not an image")
    images, preprocessing, cache = (
        images_in_folder(tmp_path / "set"),
        ImagePreprocessing(image_size=32),
        tmp_path / "cache",
    )
    alone = extract_features(images, network, preprocessing)
    network.seen = 0
    # One after the other: the barrier of rank 0 runs rank 1.
    both: list[FeatureSet] = []

    def second() -> None:
        both.append(extract_features(images, network, preprocessing, cache_dir=cache, context=DistributedContext(1, 2)))

    both.append(
        extract_features(images, network, preprocessing, cache_dir=cache, context=DistributedContext(0, 2, second))
    )
    assert network.seen == 5
    for found in both:
        assert found.names == alone.names == ["a.png", "b.png", "c.png", "d.png", "e.png"]
        assert found.skipped == alone.skipped
        assert torch.equal(found.features[0].pool, alone.features[0].pool)


def test_a_dataset_gives_the_features_of_a_folder_of_its_images(network: MeanColors, tmp_path: Path) -> None:
    save_images(tmp_path, "abc")
    rows = Dataset.from_dict({"image": [str(tmp_path / f"{n}.png") for n in "abc"], "id": ["7", "8", "9"]})
    images = images_in_dataset(rows.cast_column("image", EncodedImage()), "the test's")
    found = extract_features(images, network, ImagePreprocessing(image_size=32))
    assert found.names == ["7", "8", "9"]
    expected = read(tmp_path, network, ImagePreprocessing(image_size=32))
    assert torch.equal(found.features[0].pool, expected.features[0].pool)


def test_alpha_16_bits_and_exif_rotation_are_read_as_a_viewer_shows_them(network: Inception, tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("I;16", (32, 32), 40_000).save(tmp_path / "b.png")
    lying, exif = Image.new("RGB", (64, 32), "white"), Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    lying.save(tmp_path / "c.png", exif=exif)
    images = images_in_folder(tmp_path)
    assert [preprocess(images.decode(i), ImagePreprocessing(image_size=None)).shape for i in range(3)] == [
        (3, 32, 32), (3, 32, 32), (3, 64, 32),
    ]  # fmt: skip
    assert read(tmp_path, network, ImagePreprocessing(image_size=32)).features[0].pool[:, 0].tolist() == [255, 156, 255]


def test_a_datasets_images_may_be_undecoded_missing_or_empty(network: Inception, tmp_path: Path) -> None:
    save_images(tmp_path, "a")
    images = [{"bytes": (tmp_path / "a.png").read_bytes()}, {"bytes": b""}, {"path": str(tmp_path / "lost.png")}, None]
    images = [image and {"bytes": None, "path": None, **image} for image in images]
    rows = Dataset.from_dict({"image": images}, features=Columns(image=EncodedImage(decode=False)))
    found = extract_features(images_in_dataset(rows, "the test's"), network, ImagePreprocessing(image_size=32))
    assert found.names == ["0"]
    assert found.skipped == {"1": "empty image file", "2": "missing image", "3": "missing image"}


def test_images_of_several_sizes_need_an_image_size(network: Inception, tmp_path: Path) -> None:
    save_images(tmp_path, "ab")
    save_images(tmp_path, "c", (48, 32))
    with pytest.raises(UserError, match=r"differ in size \(32x32 and 48x32\): set preprocessing.image_size"):
        read(tmp_path, network, ImagePreprocessing(image_size=None))
    assert len(read(tmp_path, network, ImagePreprocessing(image_size=16)).names) == 3


def test_sizes_that_differ_only_between_processes(network: Inception, tmp_path: Path) -> None:
    save_images(tmp_path / "set", "ac")
    save_images(tmp_path / "set", "bd", (48, 32))
    images, preprocessing, cache = (
        images_in_folder(tmp_path / "set"),
        ImagePreprocessing(image_size=None),
        tmp_path / "cache",
    )

    def read_as(rank: int, barrier: Callable[[], None]) -> None:
        extract_features(images, network, preprocessing, cache_dir=cache, context=DistributedContext(rank, 2, barrier))

    def second() -> None:
        with pytest.raises(UserError, match=r"differ in size \(32x32 and 48x32\)"):
            read_as(1, lambda: None)

    with pytest.raises(UserError, match=r"differ in size \(32x32 and 48x32\)"):
        read_as(0, second)


def test_a_missing_folder_and_one_without_readable_images_are_refused(network: Inception, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder of images at .*none: correct the path"):
        read(tmp_path / "none", network, ImagePreprocessing())
    with pytest.raises(UserError, match=r"contains no image and 0 other files: correct the path, or add .*\.tiff"):
        read(tmp_path, network, ImagePreprocessing())
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(UserError, match=r"any of the 1 images .* first, a.png: unreadable image\): replace the files"):
        read(tmp_path, network, ImagePreprocessing())


def test_preprocessing() -> None:
    wide = Image.new("L", (64, 32), 7)
    assert preprocess(wide, ImagePreprocessing(image_size=16)).shape == (3, 16, 16)
    assert preprocess(wide, ImagePreprocessing(resize="clean-fid")).shape == (3, 299, 299)
    assert preprocess(wide, ImagePreprocessing(image_size=None)).shape == (3, 32, 64)


def test_clean_fid_resizes_as_pil_does_in_float(real_data: Path) -> None:
    for path in sorted((real_data / "coco" / "val").glob("*.jpg"))[:3]:
        photo = decode_pil({"bytes": None, "path": str(path)})
        channels = [Image.fromarray(np.asarray(channel, np.float32)) for channel in photo.split()]
        theirs = np.stack([channel.resize((299, 299), Image.Resampling.BICUBIC) for channel in channels])
        ours = preprocess(photo, ImagePreprocessing(resize="clean-fid")).numpy()
        assert np.abs(ours - theirs.clip(0, 255)).max() <= 1


def test_blur_spreads_a_point_by_its_radius() -> None:
    point = torch.zeros(1, 3, 65, 65, dtype=torch.uint8)
    point[..., 32, 32] = 255
    assert torch.equal(blur(point, 0), point)
    row = blur(point.float(), 2)[0, 0].sum(0)
    offset = torch.arange(65) - 32
    assert float((row * offset**2).sum() / row.sum()) == pytest.approx(4, rel=0.01)
    with pytest.raises(UserError, match="images of 8x8 pixels are too small for a blur of radius 8: remove 8 from"):
        blur(point[..., :8, :8], 8)


def test_blur_radii_must_not_be_empty() -> None:
    with pytest.raises(UserError, match=r"blur_radii is \[\], but must list one or more integers from 0 on"):
        Protocol(name="x", blur_radii=())


def test_counts_must_be_positive() -> None:
    with pytest.raises(UserError, match="reference_count is 0, but must be at least 1"):
        Protocol(name="x", reference_count=0)
    with pytest.raises(UserError, match=r"captions.count is 0, but must be at least 1"):
        Captions(count=0)
    with pytest.raises(UserError, match="batch_size is 0, but must be at least 1"):
        Evaluation(Protocol(name="x"), batch_size=0)


def test_weights_are_searched_as_argument_then_variable_then_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, named = tmp_path / "given.pth", tmp_path / "named.pth"
    given.touch()
    named.touch()
    monkeypatch.setenv(inception.ENV_VAR, str(named))
    assert find_or_download_weights(given) == given
    assert find_or_download_weights() == named
    monkeypatch.delenv(inception.ENV_VAR)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"put the file weights-inception-2015-12-05-6726825d.pth .* into"):
        find_or_download_weights()
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.touch()
    assert find_or_download_weights() == cached
    monkeypatch.setenv(inception.ENV_VAR, "none")
    assert find_or_download_weights(given) == given
    assert find_local_weights() is None
    with pytest.raises(UserError, match="INCEPTION is none: unset it, or set it to a file"):
        find_or_download_weights()


def test_a_file_without_inception_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_text("nothing")
    with pytest.raises(
        UserError, match=rf"cannot load Inception weights from {path} .*: give torch-fidelity's .* --inception"
    ):
        Inception(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"missing or unexpected tensors, such as .*: give torch-fidelity's weights"):
        Inception(path)
