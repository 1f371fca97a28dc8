"""Decoding of all kinds of images from the web, of broken files, and the search for images in a folder."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from lightning_dalle.data.images.decoding import (
    UnreadableImage,
    decode_image,
    decode_pil,
    find_images,
    stored_size,
)
from lightning_dalle.data.sources.openmoji import OpenMoji

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def red(mode: str, size: tuple[int, int] = (12, 8)) -> Image.Image:
    return Image.new("RGB", size, RED).convert(mode)


def reason(image: Any, **options: Any) -> str:
    with pytest.raises(UnreadableImage) as raised:
        decode_pil(image, **options)
    return raised.value.reason


def half_transparent() -> Image.Image:
    image = Image.new("RGBA", (12, 8), (*RED, 255))
    image.paste((0, 0, 0, 0), (6, 0, 12, 8))
    return image


def rotated(kind: str = "PNG") -> dict[str, Any]:
    """Return an image with a red left half, stored with an EXIF rotation."""
    image = Image.new("RGB", (48, 32), WHITE)
    image.paste(RED, (0, 0, 24, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    return encoded(image.transpose(Image.Transpose.ROTATE_90), kind, exif=exif)


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
def test_every_kind_is_decoded_to_the_same_image(image: dict[str, Any]) -> None:
    decoded = decode_pil(image)
    assert (decoded.mode, decoded.size, decoded.getcolors()) == ("RGB", (12, 8), [(96, RED)])


def test_a_cmyk_jpeg_has_its_colours() -> None:
    colours = np.asarray(decode_pil(encoded(red("CMYK"), "JPEG", quality=95)))
    assert np.abs(colours.astype(int) - RED).max() < 6


@pytest.mark.parametrize("image", [encoded(half_transparent()), encoded(half_transparent(), "GIF")])
def test_transparent_pixels_become_white(image: dict[str, Any]) -> None:
    decoded = decode_pil(image)
    assert [decoded.getpixel((x, 4)) for x in (0, 11)] == [RED, WHITE]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_intact_and_damaged_jpegs_have_the_pixels_of_pillow(capfd: pytest.CaptureFixture[str]) -> None:
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
        assert np.array_equal(decode_image(kind), Image.open(io.BytesIO(kind["bytes"])).convert("RGB"))
    whole, outcomes = kinds[0]["bytes"], {True: 0, False: 0}
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.integers(2, len(whole))] = rng.integers(0, 256)
        try:
            by_pillow = Image.open(io.BytesIO(damaged), formats=["JPEG"]).convert("RGB")
        except Exception:
            assert reason({"bytes": bytes(damaged), "path": None}) == "unreadable image"
        else:
            assert np.array_equal(decode_image({"bytes": bytes(damaged), "path": None}), by_pillow)
        outcomes[is_read_by_simplejpeg(damaged)] += 1
    assert min(outcomes.values()) > 10, "simplejpeg must accept some and reject some"
    assert capfd.readouterr().err == "", "libjpeg's messages would break progress bars"


def test_pillow_reads_only_the_header_of_upright_jpegs(monkeypatch: pytest.MonkeyPatch) -> None:
    jpegs = [encoded(red(mode), "JPEG") for mode in ("RGB", "L")]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded by Pillow"))
    for jpeg in jpegs:
        assert decode_image(jpeg).shape == (8, 12, 3)


def is_read_by_simplejpeg(jpeg: bytearray) -> bool:
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
        assert np.array_equal(np.asarray(decode_pil(image)), grey)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_rotation_is_applied(kind: str) -> None:
    pixels = decode_image(rotated(kind))
    assert pixels.shape == (32, 48, 3)
    for x, colour in ((0, RED), (47, WHITE)):
        assert np.abs(pixels[16, x].astype(int) - colour).max() < 3
    assert stored_size(rotated(kind)) == (32, 48), "before rotation"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_with_broken_exif_is_decoded(kind: str) -> None:
    broken = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"  # announces far more data than there is
    for exif in (b"Exif\0\0broken", broken):
        assert decode_pil(encoded(red("RGB"), kind, exif=exif)).size == (12, 8)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_truncated_or_corrupt_images_raise_no_other_error() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = encoded(noise, kind)["bytes"]
        assert {reason({"bytes": whole[:end], "path": None}) for end in (1, 10, len(whole) // 2)} == {
            "unreadable image"
        }
        for _ in range(20):
            damaged = np.frombuffer(whole, np.uint8).copy()
            damaged[rng.integers(0, len(whole), 20)] = rng.integers(0, 256, 20)
            with contextlib.suppress(UnreadableImage):
                assert decode_pil({"bytes": damaged.tobytes(), "path": None}).mode == "RGB"


def test_missing_and_unreadable_images_have_a_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    assert reason({"bytes": b"", "path": None}) == "empty image file"
    assert reason({"bytes": None, "path": str(tmp_path / "empty.jpg")}) == "empty image file"
    assert reason({"bytes": None, "path": str(tmp_path / "lost.jpg")}) == "missing image"
    assert reason({"bytes": None, "path": None}) == reason(None) == "missing image"
    assert reason({"bytes": None, "path": str(tmp_path)}) == "unreadable image"
    assert reason({"bytes": b"<html>404</html>", "path": "cat.jpg"}) == "unreadable image"
    assert reason({"bytes": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "path": None}) == "unreadable image"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    large = encoded(Image.new("1", (10_000, 10_000)))
    jpeg = encoded(Image.new("L", (10_000, 10_000)), "JPEG")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("lightning_dalle.data.images.decoding.decode_jpeg", lambda *_: pytest.fail("decoded"))
    for image in (bomb, large, jpeg):
        assert reason(image) == "oversized image"
        with pytest.raises(UnreadableImage, match="oversized image"):
            stored_size(image)
    assert reason(encoded(red("RGB")), max_pixels=95) == "oversized image"
    assert stored_size(encoded(Image.new("1", (20_000, 100)))) == (20_000, 100)


def test_bytes_paths_and_urls_give_the_same_image(tmp_path: Path) -> None:
    image = encoded(red("RGB"))
    (tmp_path / "red.png").write_bytes(image["bytes"])
    for path in (str(tmp_path / "red.png"), f"file://{tmp_path}/red.png"):
        assert decode_pil({"bytes": None, "path": path}) == decode_pil(image)


def test_emoji_are_decoded_as_by_datasets() -> None:
    from datasets import Image as EncodedImage

    rows = OpenMoji().load(32)["val"]
    for decoded, image in zip(
        rows["image"], rows.cast_column("image", EncodedImage(decode=False))["image"], strict=True
    ):
        assert decode_pil(image) == decoded.convert("RGB")


def test_find_images_reads_all_formats_and_counts_ignored_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a.tiff", "b.TIF", "c.avif", "d.gif", "sub/e.jpg", "sub/f.webp"]
    (tmp_path / "sub").mkdir()
    for name in [*names, "captions.json", "sub/more.JSON", "notes.txt", "LICENSE", ".hidden.json", ".hidden.png"]:
        (tmp_path / name).touch()
    images, ignored = find_images(tmp_path)
    assert images == [tmp_path / name for name in names]
    assert ignored == {".json": 2, ".txt": 1, "": 1}
    assert f"{tmp_path}/: ignored 4 files that are not images (2 .json, " in caplog.text
    assert find_images(tmp_path, captions=[".txt"])[1] == {".json": 2, "": 1}
