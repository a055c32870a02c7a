"""Image files to RGB pixels.

EXIF rotation is not applied: annotations refer to the pixels as they are stored.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from rfdetr.errors import DatasetError

Pixels = npt.NDArray[np.uint8]

JPEG_START = b"\xff\xd8\xff"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode to RGB; 16-bit gray levels are scaled to 8 bits, alpha is dropped."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        eight_bit = (levels >> 8).astype(np.uint8) if levels.max(initial=0) > 255 else levels
        return Image.fromarray(eight_bit.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def decode_image(path: str | os.PathLike[str], min_size: tuple[int, int] = (0, 0)) -> Pixels:
    """Read an image file as uint8 RGB (H, W, 3).

    A JPEG may come back smaller by a power of two when `min_size` (height, width) is given and the
    smaller picture still has at least those sides; with (0, 0) every pixel is decoded.
    Raises DatasetError that names the file.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DatasetError(
            f"{path}: the image cannot be read: {error.strerror or error}"
        ) from error
    if not data:
        raise DatasetError(f"{path}: the image file is empty (0 bytes). Restore or remove it.")
    if data.startswith(JPEG_START):
        pixels = _decode_jpeg(data, min_size)
        if pixels is not None:
            return pixels
    return _decode_any(path, data)


def _decode_jpeg(data: bytes, min_size: tuple[int, int]) -> Pixels | None:
    """The pixels, equal to Pillow's; None where Pillow must look (CMYK, damaged files)."""
    height, width = min_size
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:
        return None
    return cast(Pixels, pixels)


def _decode_any(path: str | os.PathLike[str], data: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(to_rgb(image))
    except (
        OSError,
        ValueError,
        SyntaxError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
    ) as error:
        raise DatasetError(
            f"{path}: the image cannot be decoded ({error}). Replace or remove the file."
        ) from error
