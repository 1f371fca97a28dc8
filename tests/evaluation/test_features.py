"""Folders of pictures: what is read, passed over, refused and kept."""

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

from lightning_dalle.data.images.decoding import read_picture
from lightning_dalle.errors import UserError
from lightning_dalle.evaluation import inception
from lightning_dalle.evaluation.features import (
    ImageSet,
    Processes,
    blur,
    dataset_pictures,
    folder_pictures,
    prepare,
    read_pictures,
)
from lightning_dalle.evaluation.inception import Features, Inception, find_weights, weights_at_hand
from lightning_dalle.evaluation.protocol import Captions, Preparation, Protocol
from lightning_dalle.training.callbacks.evaluation import Evaluation


class MeanColours(Inception):
    """Stands in for Inception: a feature is a mean colour."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.sha256 = "0" * 64
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.seen = 0

    def features(self, images: torch.Tensor) -> Features:
        self.seen += len(images)
        return Features(images.float().mean((2, 3)).repeat(1, 683)[:, :2048], None)


def read(folder: Path, *args: Any, **kwargs: Any) -> ImageSet:
    return read_pictures(folder_pictures(folder), *args, **kwargs)


@pytest.fixture
def network() -> MeanColours:
    return MeanColours()


def draw(folder: Path, names: str, size: tuple[int, int] = (32, 32)) -> None:
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", size, (i * 10, 100, 200)).save(folder / f"{name}.png")


def test_unreadable_pictures_are_named_and_the_others_kept(network: Inception, tmp_path: Path) -> None:
    draw(tmp_path, "abc")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
    (tmp_path / "bb.jpg").write_text("no picture")
    (tmp_path / "d.png").touch()
    found = read(tmp_path, network, Preparation(image_size=32), batch_size=2)
    assert found.names == ["a.png", "c.png"]
    assert found.skipped == {"b.png": "unreadable picture", "bb.jpg": "unreadable picture", "d.png": "zero bytes"}
    assert found.features[0].pool[:, 0].tolist() == [0, 20]


def test_a_folder_is_seen_once_under_one_protocol(network: MeanColours, tmp_path: Path) -> None:
    draw(tmp_path / "set", "abc")
    cache, preparation = tmp_path / "cache", Preparation(image_size=32)
    first = read(tmp_path / "set", network, preparation, (0, 1), cache_dir=cache)
    again = read(tmp_path / "set", network, preparation, (0, 1), cache_dir=cache)
    assert network.seen == 6
    assert again.names == first.names
    assert torch.equal(again.features[1].pool, first.features[1].pool)
    read(tmp_path / "set", network, Preparation(image_size=16), (0, 1), cache_dir=cache)
    assert network.seen == 12
    draw(tmp_path / "set", "d")
    assert len(read(tmp_path / "set", network, preparation, (0, 1), cache_dir=cache).names) == 4


def test_two_processes_read_each_picture_once_and_both_have_them_all(network: MeanColours, tmp_path: Path) -> None:
    draw(tmp_path / "set", "abcde")
    (tmp_path / "set" / "bb.jpg").write_text("no picture")
    pictures, preparation, cache = folder_pictures(tmp_path / "set"), Preparation(image_size=32), tmp_path / "cache"
    alone = read_pictures(pictures, network, preparation)
    network.seen = 0
    # Not side by side: each waits at the barrier, where here the other one is begun.
    both: list[ImageSet] = []

    def second() -> None:
        both.append(read_pictures(pictures, network, preparation, cache_dir=cache, processes=Processes(1, 2)))

    both.append(read_pictures(pictures, network, preparation, cache_dir=cache, processes=Processes(0, 2, second)))
    assert network.seen == 5
    for found in both:
        assert found.names == alone.names == ["a.png", "b.png", "c.png", "d.png", "e.png"]
        assert found.skipped == alone.skipped
        assert torch.equal(found.features[0].pool, alone.features[0].pool)


def test_a_dataset_gives_what_a_folder_of_its_pictures_gives(network: MeanColours, tmp_path: Path) -> None:
    draw(tmp_path, "abc")
    rows = Dataset.from_dict({"image": [str(tmp_path / f"{n}.png") for n in "abc"], "id": ["7", "8", "9"]})
    pictures = dataset_pictures(rows.cast_column("image", EncodedImage()), "the test's")
    found = read_pictures(pictures, network, Preparation(image_size=32))
    assert found.names == ["7", "8", "9"]
    expected = read(tmp_path, network, Preparation(image_size=32))
    assert torch.equal(found.features[0].pool, expected.features[0].pool)


def test_strangers_pictures_are_what_a_viewer_shows(network: Inception, tmp_path: Path) -> None:
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("I;16", (32, 32), 40_000).save(tmp_path / "b.png")
    lying, exif = Image.new("RGB", (64, 32), "white"), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    lying.save(tmp_path / "c.png", exif=exif)
    pictures = folder_pictures(tmp_path)
    assert [prepare(pictures.open(i), Preparation(image_size=None)).shape for i in range(3)] == [
        (3, 32, 32), (3, 32, 32), (3, 64, 32),
    ]  # fmt: skip
    assert read(tmp_path, network, Preparation(image_size=32)).features[0].pool[:, 0].tolist() == [255, 156, 255]


def test_a_dataset_s_pictures_may_be_undecoded_missing_or_empty(network: Inception, tmp_path: Path) -> None:
    draw(tmp_path, "a")
    images = [{"bytes": (tmp_path / "a.png").read_bytes()}, {"bytes": b""}, {"path": str(tmp_path / "lost.png")}, None]
    images = [image and {"bytes": None, "path": None, **image} for image in images]
    rows = Dataset.from_dict({"image": images}, features=Columns(image=EncodedImage(decode=False)))
    found = read_pictures(dataset_pictures(rows, "the test's"), network, Preparation(image_size=32))
    assert found.names == ["0"]
    assert found.skipped == {"1": "zero bytes", "2": "without a picture", "3": "without a picture"}


def test_pictures_of_several_sizes_need_one_to_be_brought_to(network: Inception, tmp_path: Path) -> None:
    draw(tmp_path, "ab")
    draw(tmp_path, "c", (48, 32))
    with pytest.raises(UserError, match=r"differ in size \(32x32 and 48x32\): give an image_size"):
        read(tmp_path, network, Preparation(image_size=None))
    assert len(read(tmp_path, network, Preparation(image_size=16)).names) == 3


def test_sizes_that_differ_between_processes_alone(network: Inception, tmp_path: Path) -> None:
    draw(tmp_path / "set", "ac")
    draw(tmp_path / "set", "bd", (48, 32))
    pictures, preparation, cache = folder_pictures(tmp_path / "set"), Preparation(image_size=None), tmp_path / "cache"

    def read_as(rank: int, barrier: Callable[[], None]) -> None:
        read_pictures(pictures, network, preparation, cache_dir=cache, processes=Processes(rank, 2, barrier))

    def second() -> None:
        with pytest.raises(UserError, match=r"differ in size \(32x32 and 48x32\)"):
            read_as(1, lambda: None)

    with pytest.raises(UserError, match=r"differ in size \(32x32 and 48x32\)"):
        read_as(0, second)


def test_no_folder_no_pictures_and_none_that_can_be_read(network: Inception, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder of pictures"):
        read(tmp_path / "none", network, Preparation())
    with pytest.raises(UserError, match="holds no picture"):
        read(tmp_path, network, Preparation())
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(UserError, match="none of the 1 pictures"):
        read(tmp_path, network, Preparation())


def test_preparation() -> None:
    wide = Image.new("L", (64, 32), 7)
    assert prepare(wide, Preparation(image_size=16)).shape == (3, 16, 16)
    assert prepare(wide, Preparation(resize="clean-fid")).shape == (3, 299, 299)
    assert prepare(wide, Preparation(image_size=None)).shape == (3, 32, 64)


def test_clean_fid_s_bicubic_is_that_of_pil_in_floats(real_data: Path) -> None:
    for path in sorted((real_data / "coco" / "val").glob("*.jpg"))[:3]:
        photo = read_picture({"bytes": None, "path": str(path)})
        channels = [Image.fromarray(np.asarray(channel, np.float32)) for channel in photo.split()]
        theirs = np.stack([channel.resize((299, 299), Image.Resampling.BICUBIC) for channel in channels])
        ours = prepare(photo, Preparation(resize="clean-fid")).numpy()
        assert np.abs(ours - theirs.clip(0, 255)).max() <= 1


def test_blur_spreads_a_point_by_its_radius() -> None:
    point = torch.zeros(1, 3, 65, 65, dtype=torch.uint8)
    point[..., 32, 32] = 255
    assert torch.equal(blur(point, 0), point)
    row = blur(point.float(), 2)[0, 0].sum(0)
    offset = torch.arange(65) - 32
    assert float((row * offset**2).sum() / row.sum()) == pytest.approx(4, rel=0.01)
    with pytest.raises(UserError, match="too small for a blur"):
        blur(point[..., :8, :8], 8)


def test_protocol_without_radii() -> None:
    with pytest.raises(UserError, match="blur_radii"):
        Protocol(name="x", blur_radii=())


def test_counts_of_none() -> None:
    with pytest.raises(UserError, match="reference_count is 0, but must be at least 1"):
        Protocol(name="x", reference_count=0)
    with pytest.raises(UserError, match="the captions' count is 0, but must be at least 1"):
        Captions(count=0)
    with pytest.raises(UserError, match="batch_size is 0, but must be at least 1"):
        Evaluation(Protocol(name="x"), batch_size=0)


def test_weights_are_found_by_setting_then_variable_then_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, named = tmp_path / "given.pth", tmp_path / "named.pth"
    given.touch()
    named.touch()
    monkeypatch.setenv(inception.VARIABLE, str(named))
    assert find_weights(given) == given
    assert find_weights() == named
    monkeypatch.delenv(inception.VARIABLE)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"put the file weights-inception-2015-12-05-6726825d.pth .* into"):
        find_weights()
    cached = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    cached.touch()
    assert find_weights() == cached
    monkeypatch.setenv(inception.VARIABLE, "none")
    assert find_weights(given) == given
    assert weights_at_hand() is None
    with pytest.raises(UserError, match="is none: unset it"):
        find_weights()


def test_a_file_that_is_no_inception_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_text("nothing")
    with pytest.raises(UserError, match="does not hold Inception weights"):
        Inception(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="differ from the network in"):
        Inception(path)
