"""Pictures of every kind that strangers make, and those that are none."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from lightning_dalle.data.images.decoding import Unreadable, picture_size, read_picture, read_pixels
from lightning_dalle.data.sources.openmoji import OpenMoji

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def red(mode: str, size: tuple[int, int] = (12, 8)) -> Image.Image:
    return Image.new("RGB", size, RED).convert(mode)


def reason(image: Any, **options: Any) -> str:
    with pytest.raises(Unreadable) as raised:
        read_picture(image, **options)
    return raised.value.reason


def half_transparent() -> Image.Image:
    picture = Image.new("RGBA", (12, 8), (*RED, 255))
    picture.paste((0, 0, 0, 0), (6, 0, 12, 8))
    return picture


def turned(kind: str = "PNG") -> dict[str, Any]:
    """A red left half, stored lying on its side."""
    picture = Image.new("RGB", (48, 32), WHITE)
    picture.paste(RED, (0, 0, 24, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    return encoded(picture.transpose(Image.Transpose.ROTATE_90), kind, exif=exif)


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(encoded(red("RGB")), id="rgb"),
        pytest.param(encoded(red("P")), id="palette"),
        pytest.param(encoded(red("RGBA")), id="alpha"),
        pytest.param(encoded(red("CMYK"), "TIFF"), id="cmyk"),
        pytest.param(encoded(red("RGB"), "GIF", save_all=True, append_images=[red("L")]), id="animated gif"),
        pytest.param(
            encoded(red("RGB"), "WEBP", lossless=True, save_all=True, append_images=[red("L")]), id="animated webp"
        ),
    ],
)
def test_every_kind_is_read_as_the_same_picture(image: dict[str, Any]) -> None:
    picture = read_picture(image)
    assert (picture.mode, picture.size, picture.getcolors()) == ("RGB", (12, 8), [(96, RED)])


def test_a_cmyk_jpeg_has_its_colours() -> None:
    colours = np.asarray(read_picture(encoded(red("CMYK"), "JPEG", quality=95)))
    assert np.abs(colours.astype(int) - RED).max() < 6


@pytest.mark.parametrize("image", [encoded(half_transparent()), encoded(half_transparent(), "GIF")])
def test_what_is_transparent_is_white(image: dict[str, Any]) -> None:
    picture = read_picture(image)
    assert [picture.getpixel((x, 4)) for x in (0, 11)] == [RED, WHITE]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_jpegs_have_the_pixels_that_pillow_gives_them_whole_or_damaged(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((97, 63))
    kinds = [
        encoded(smooth, "JPEG"),
        encoded(smooth, "JPEG", progressive=True),
        encoded(smooth, "JPEG", subsampling="4:2:2"),
        encoded(smooth, "JPEG", keep_rgb=True),
        *(encoded(smooth.convert(mode), "JPEG") for mode in ("L", "CMYK")),
    ]
    for kind in kinds:
        assert np.array_equal(read_pixels(kind), Image.open(io.BytesIO(kind["bytes"])).convert("RGB"))
    whole, judged = kinds[0]["bytes"], {True: 0, False: 0}
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.integers(2, len(whole))] = rng.integers(0, 256)
        try:
            theirs = Image.open(io.BytesIO(damaged), formats=["JPEG"]).convert("RGB")
        except Exception:
            assert reason({"bytes": bytes(damaged), "path": None}) == "unreadable picture"
        else:
            assert np.array_equal(read_pixels({"bytes": bytes(damaged), "path": None}), theirs)
        judged[reads(damaged)] += 1
    assert min(judged.values()) > 10, "both those that simplejpeg takes and those that it leaves to Pillow"
    assert capfd.readouterr().err == "", "nobody wants libjpeg's remarks between two progress bars"


def test_of_upright_jpegs_pillow_reads_the_header_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    jpegs = [encoded(red(mode), "JPEG") for mode in ("RGB", "L")]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded by Pillow"))
    for jpeg in jpegs:
        assert read_pixels(jpeg).shape == (8, 12, 3)


def reads(jpeg: bytearray) -> bool:
    with contextlib.suppress(ValueError):
        simplejpeg.decode_jpeg(jpeg, "RGB")
        return True
    return False


def test_grey_and_16_bits_keep_their_scale() -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    for image in (
        encoded(Image.fromarray(ramp)),
        encoded(Image.fromarray(ramp), "TIFF"),
        encoded(Image.fromarray(grey[..., 0])),
    ):
        assert np.array_equal(np.asarray(read_picture(image)), grey)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_is_turned_as_exif_says(kind: str) -> None:
    pixels = read_pixels(turned(kind))
    assert pixels.shape == (32, 48, 3)
    for x, colour in ((0, RED), (47, WHITE)):
        assert np.abs(pixels[16, x].astype(int) - colour).max() < 3
    assert picture_size(turned(kind)) == (32, 48), "as it is stored"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_broken_exif_does_not_cost_the_picture(kind: str) -> None:
    broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"  # says that there is much more of it
    for exif in (b"Exif\0\0broken", broken):
        assert read_picture(encoded(red("RGB"), kind, exif=exif)).size == (12, 8)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_truncated_or_corrupt_anywhere_is_unreadable_and_never_anything_else() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = encoded(noise, kind)["bytes"]
        assert {reason({"bytes": whole[:end], "path": None}) for end in (1, 10, len(whole) // 2)} == {
            "unreadable picture"
        }
        for _ in range(20):
            damaged = np.frombuffer(whole, np.uint8).copy()
            damaged[rng.integers(0, len(whole), 20)] = rng.integers(0, 256, 20)
            with contextlib.suppress(Unreadable):
                assert read_picture({"bytes": damaged.tobytes(), "path": None}).mode == "RGB"


def test_what_is_no_picture_has_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    assert reason({"bytes": b"", "path": None}) == "zero bytes"
    assert reason({"bytes": None, "path": str(tmp_path / "empty.jpg")}) == "zero bytes"
    assert reason({"bytes": None, "path": str(tmp_path / "lost.jpg")}) == "without a picture"
    assert reason({"bytes": None, "path": None}) == reason(None) == "without a picture"
    assert reason({"bytes": None, "path": str(tmp_path)}) == "unreadable picture"
    assert reason({"bytes": b"<html>404</html>", "path": "cat.jpg"}) == "unreadable picture"
    assert reason({"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "path": None}) == "unreadable picture"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    large = encoded(Image.new("1", (10_000, 10_000)))
    jpeg = encoded(Image.new("L", (10_000, 10_000)), "JPEG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("lightning_dalle.data.images.decoding.decode_jpeg", lambda *_: pytest.fail("decoded"))
    for image in (bomb, large, jpeg):
        assert reason(image) == "too many pixels"
        with pytest.raises(Unreadable, match="too many pixels"):
            picture_size(image)
    assert reason(encoded(red("RGB")), max_pixels=95) == "too many pixels"
    assert picture_size(encoded(Image.new("1", (20_000, 100)))) == (20_000, 100)


def test_bytes_paths_and_urls_alike(tmp_path: Path) -> None:
    image = encoded(red("RGB"))
    (tmp_path / "red.png").write_bytes(image["bytes"])
    for path in (str(tmp_path / "red.png"), f"file://{tmp_path}/red.png"):
        assert read_picture({"bytes": None, "path": path}) == read_picture(image)


def test_emoji_are_read_as_ever() -> None:
    from datasets import Image as EncodedImage

    rows = OpenMoji().load(32)["val"]
    for decoded, image in zip(
        rows["image"], rows.cast_column("image", EncodedImage(decode=False))["image"], strict=True
    ):
        assert read_picture(image) == decoded.convert("RGB")
