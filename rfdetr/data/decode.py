"""Image files to RGB pixels, without torch, so that checking processes start fast.

EXIF rotation is not applied: annotations refer to the pixels as they are stored.
"""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from rfdetr.errors import DatasetError

Pixels = npt.NDArray[np.uint8]

# Suffixes of the formats that are read, by Pillow's name of the format.
FORMAT_SUFFIXES: dict[str, frozenset[str]] = {
    "JPEG": frozenset({".jpg", ".jpeg", ".jpe", ".jfif"}),
    "MPO": frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"}),
    "PNG": frozenset({".png"}),
    "BMP": frozenset({".bmp", ".dib"}),
    "GIF": frozenset({".gif"}),
    "TIFF": frozenset({".tif", ".tiff"}),
    "WEBP": frozenset({".webp"}),
    "PPM": frozenset({".ppm", ".pgm", ".pbm", ".pnm"}),
    "JPEG2000": frozenset({".jp2", ".j2k", ".jpf", ".jpx", ".jpc"}),
    "AVIF": frozenset({".avif"}),
}
IMAGE_SUFFIXES = frozenset().union(*FORMAT_SUFFIXES.values())
JPEG_START = b"\xff\xd8\xff"
FAILURES = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,  # from Pillow on a PNG truncated between two chunks
    Image.DecompressionBombError,
)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB; 16-bit grey levels are scaled to 8 bits, alpha is dropped.

    The bit depth of the file decides, not the content: a dark frame of a 16-bit camera stays dark.
    32-bit integers do not tell their depth; they count as 8 bits if no level is above 255.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        deep = image.mode != "I" or image.format == "PPM" or levels.max(initial=0) > 255
        eight_bit = levels >> 8 if deep else levels
        return Image.fromarray(eight_bit.astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


class ImageFile:
    """An image file whose size is read before its pixels are decoded.

    `height` and `width` are in pixels. Raises DatasetError that names the file if it cannot be
    read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._data = self.path.read_bytes()
        except OSError as error:
            raise self._failure("cannot be read", error.strerror or error) from error
        if not self._data:
            raise self._failure("is empty", "0 bytes")
        self.width, self.height, self._jpeg = self._header()

    def _header(self) -> tuple[int, int, bool]:
        """(width, height, whether the fast decoder may try)."""
        if self._data.startswith(JPEG_START):
            try:
                height, width, space, _ = simplejpeg.decode_jpeg_header(self._data)
            except ValueError:
                pass  # let Pillow try, and report the error
            else:
                if space != "CMYK":
                    return width, height, True
        try:
            with Image.open(io.BytesIO(self._data)) as image:
                return image.width, image.height, False
        except FAILURES as error:
            raise self._failure("cannot be decoded", error) from error

    def decode(self, min_height: int = 0, min_width: int = 0) -> Pixels:
        """The pixels as uint8 RGB (H, W, 3).

        With `min_height` and `min_width` a JPEG may be reduced while decoding, to no less than
        those sides; without them every pixel is decoded.
        """
        if self._jpeg:
            try:
                pixels: Pixels = simplejpeg.decode_jpeg(
                    self._data, "RGB", min_height=min_height, min_width=min_width
                )
                return pixels
            except ValueError:
                pass  # let Pillow try, and report the error
        try:
            with Image.open(io.BytesIO(self._data)) as image:
                return np.asarray(to_rgb(image))
        except FAILURES as error:
            raise self._failure("cannot be decoded", error) from error

    def _failure(self, what: str, why: object) -> DatasetError:
        return DatasetError(
            f"{self.path}: the image {what} ({why}). Restore the file, or remove it from the "
            "dataset; `python -m rfdetr.checks` lists all such files."
        )
