from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfdetr.data.decode import IMAGE_SUFFIXES, ImageFile, open_image, require_pixels
from rfdetr.data.image_input import as_rgb_image
from rfdetr.errors import DatasetError


def image(width: int = 70, height: int = 50) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 3, y * 4, x + y], -1).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 60}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_pixels_equal_those_of_pillow(tmp_path: Path, options: dict, mode: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(image().convert(mode), **options))
    file = ImageFile(path)
    assert (file.width, file.height) == (70, 50)
    np.testing.assert_array_equal(file.decode(), np.asarray(Image.open(path).convert("RGB")))


def test_rotation_tags_are_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(image(), exif=exif))
    assert ImageFile(path).decode().shape == (50, 70, 3)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "jpg"])
def test_other_formats_whatever_their_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a.jpg"
    image().save(path, format={"jpg": "JPEG"}.get(suffix, suffix.upper()))
    assert ImageFile(path).decode().shape == (50, 70, 3)


def test_reduced_decoding_keeps_the_asked_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(image(800, 600)))
    reduced = ImageFile(path).decode(140, 180)
    assert 140 <= reduced.shape[0] < 600
    assert 180 <= reduced.shape[1] < 800


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"not an image", "cannot be decoded"),
        (jpeg(image())[:300], "cannot be decoded"),
        (jpeg(image())[:-200], "cannot be decoded"),
        (b"\xff\xd8\xff" + bytes(50), "cannot be decoded"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"broken\.jpg: the image .*{words}"):
        ImageFile(path).decode()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.jpg: the image cannot be read"):
        ImageFile(tmp_path / "none.jpg")
    with pytest.raises(DatasetError, match="cannot be read"):
        ImageFile(tmp_path)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(require_pixels, "__defaults__", (1000,))
    monkeypatch.setattr(open_image, "__defaults__", (1000,))
    for name in ("bomb.png", "bomb.jpg"):
        image().save(tmp_path / name)
        with pytest.raises(DatasetError, match=rf"{name}.*70 x 50 pixels, more than 1,000"):
            ImageFile(tmp_path / name)


def test_images_beyond_the_limit_of_pillow_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert ImageFile(tmp_path / "a.png").decode().shape == (50, 70, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000


DEEP = [
    (np.uint16, [0, 1000, 4000], [0, 64, 255]),  # a 12-bit camera
    (np.uint16, [29000, 30000, 31000], [0, 128, 255]),  # a thermal sensor
    (np.uint16, [3, 100, 200], [3, 100, 200]),
    (np.int32, [0, 100, 200], [0, 100, 200]),
    (np.int32, [-100, 0, 300], [0, 64, 255]),
    (np.float32, [0.0, 0.5, 1.0], [0, 128, 255]),
    (np.float32, [0.0, 0.1, 0.2], [0, 26, 51]),
    (np.float32, [280.0, 290.0, 300.0], [0, 128, 255]),
    (np.float32, [0.0, 100.0, 255.0], [0, 100, 255]),
    (np.float32, [np.nan, 0.0, 1.0], [0, 0, 255]),
    (np.float32, [-np.inf, 0.5, np.inf], [128, 128, 128]),
    (np.float32, [np.nan, np.nan, np.nan], [0, 0, 0]),
]


@pytest.mark.parametrize(("kind", "levels", "expected"), DEEP)
def test_levels_of_deep_images(
    tmp_path: Path, kind: type, levels: list[float], expected: list[int]
) -> None:
    Image.fromarray(np.array([levels], kind)).save(tmp_path / "a.tif")
    pixels = ImageFile(tmp_path / "a.tif").decode()
    assert pixels[0].tolist() == [[level] * 3 for level in expected]
    served = as_rgb_image(Image.open(tmp_path / "a.tif"))
    np.testing.assert_array_equal(np.asarray(served), pixels)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0", "HEIC.*magick mogrify"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n\n<!doctype html>", "a web page"),
        (b'{"error": "not found"}', "JSON text"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"\0\0\0\x20ftypisom", "a video"),
        (b"outs:\n- md5: abc", "dvc pull"),
        (bytes(4000), "zero bytes"),
        (b"\n\xff\xd8\xff\xe0", "behind 1 other bytes"),
        (b"8BPS\0\1", "Photoshop"),
        (b"hello", "no known image format"),
    ],
)
def test_a_file_that_is_not_an_image_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DatasetError, match=words):
        ImageFile(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", [".jfif", ".webp", ".avif", ".jpe", ".JPG"])
def test_less_common_suffixes_are_read(tmp_path: Path, suffix: str) -> None:
    kind = "JPEG" if suffix.lower().startswith(".j") else suffix[1:].upper()
    if kind not in Image.SAVE and not (Image.init() and kind in Image.SAVE):
        pytest.skip(f"this Pillow has no {kind}")
    image().save(tmp_path / f"a{suffix}", kind)
    pixels = ImageFile(tmp_path / f"a{suffix}").decode().astype(int)
    assert np.abs(pixels - np.asarray(image(), int)).mean() < 12
    assert suffix.lower() in IMAGE_SUFFIXES
