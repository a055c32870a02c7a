from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rfdetr.data.decode import ImageFile
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
    path = tmp_path / "bomb.png"
    image().save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DatasetError, match=r"bomb\.png.*decompression bomb"):
        ImageFile(path)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_dark_frames_of_a_16_bit_camera_stay_dark(tmp_path: Path, name: str) -> None:
    for level in (200, 60_000):
        pixels = np.full((5, 7), level, np.uint16)
        Image.fromarray(pixels).save(tmp_path / name)
        assert set(ImageFile(tmp_path / name).decode().ravel().tolist()) == {level >> 8}


def test_32_bit_levels_that_fit_into_8_bits_stay(tmp_path: Path) -> None:
    Image.fromarray(np.full((5, 7), 200, np.int32)).save(tmp_path / "a.tif")
    assert ImageFile(tmp_path / "a.tif").decode().max() == 200
