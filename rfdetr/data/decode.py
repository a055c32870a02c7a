"""Image files to RGB pixels, without torch, so that checking processes start fast.

The dataset checks, training, predict and serving all decode here. EXIF rotation is not applied:
annotations refer to the pixels as they are stored.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

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
# Images that Pillow cannot read without a plugin, or that are not images for a detector.
UNREAD_SUFFIXES = frozenset(
    {".heic", ".heif", ".jxl", ".tga", ".psd", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
)
CONVERT = "convert them: `magick mogrify -format jpg *{}`"
# Pillow tries no other plugin; it opens MPO through JPEG.
FORMATS = tuple(name for name in FORMAT_SUFFIXES if name != "MPO")
MAX_PIXELS = 1_000_000_000  # 3 GB as RGB; a larger image is taken for a decompression bomb
JPEG_START = b"\xff\xd8\xff"
FAILURES = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,  # from Pillow on a PNG truncated between two chunks
    Image.DecompressionBombError,
)
_limit_lock = threading.Lock()


# Contents that are taken for images, by where in the file they start, and what to do about them.
OTHER_CONTENT: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyphei", "HEIC, which is not read; convert it: `magick mogrify -format jpg *.heic`"),
    (4, b"ftyphev", "HEIC, which is not read; convert it: `magick mogrify -format jpg *.heic`"),
    (4, b"ftypmif1", "HEIF, which is not read; convert it: `magick mogrify -format jpg *.heif`"),
    (0, b"version https://git-lfs", "a pointer of Git LFS; run `git lfs pull`"),
    (0, b"8BPS", "a Photoshop file; export it as PNG"),
    (0, b"\xff\x0a", "JPEG XL, which is not read; convert it to PNG or JPEG"),
    (0, b"\0\0\0\x0cJXL", "JPEG XL, which is not read; convert it to PNG or JPEG"),
    (0, b"%PDF", "a PDF document; export its pages as PNG"),
    (0, b"<svg", "an SVG drawing; export it as PNG"),
    (0, b"<!DOCTYPE", "a web page, not an image (a failed download?)"),
    (0, b"<html", "a web page, not an image (a failed download?)"),
    (0, b"<?xml", "an XML document, not an image"),
)


def describe_content(data: bytes) -> str:
    """What a file is that no image format accepts."""
    names = (text for at, magic, text in OTHER_CONTENT if data.startswith(magic, at))
    return next(names, "no known image format")


class ImageTooLargeError(ValueError):
    """An image with more pixels than allowed, recognised by its header."""


def require_pixels(width: int, height: int, limit: int = MAX_PIXELS) -> None:
    """Raise ImageTooLargeError for an image of more than `limit` pixels."""
    if width * height > limit:
        raise ImageTooLargeError(f"{width} x {height} pixels, more than {limit:,}")


def open_image(data: bytes, limit: int = MAX_PIXELS) -> Image.Image:
    """The image of a file's content, header read, pixels not yet decoded.

    Raises one of FAILURES; ImageTooLargeError, one of them, for more than `limit` pixels.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    with _limit_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow about metadata that is not read
        kept, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = kept
    require_pixels(image.width, image.height, limit)
    return image


def file_size(path: Path) -> tuple[int, int] | None:
    """(width, height) in pixels from the header of an image file, None if it has none."""
    try:
        file = ImageFile(path)
    except DatasetError:
        return None
    return file.width, file.height


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL mode to RGB; deep grey levels are scaled to 8 bits, alpha is dropped."""
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(eight_bit_levels(np.asarray(image))).convert("RGB")
    return image.convert("RGB")


def eight_bit_levels(levels: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Grey levels of a 16-bit, 32-bit or float image as 8 bits.

    The levels of the image decide, not the number type, which says nothing about a 12-bit camera
    or a thermal sensor: levels within 0..255 stay as they are, floats within 0..1 are multiplied
    by 255, and all others are scaled linearly from the smallest and largest finite level of the
    image to 0..255. NaN becomes the smallest level, an infinity the nearest finite one.
    """
    values = levels.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    if low >= 0 and high <= 1 and levels.dtype.kind == "f":
        values *= 255
    elif low < 0 or high > 255:
        values = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return np.rint(values).astype(np.uint8)


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
                    self._require_pixels(width, height)
                    return width, height, True
        try:
            with open_image(self._data) as image:
                return image.width, image.height, False
        except UnidentifiedImageError as error:
            raise self._failure("cannot be decoded", describe_content(self._data)) from error
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
            with open_image(self._data) as image:
                return np.asarray(to_rgb(image))
        except FAILURES as error:
            raise self._failure("cannot be decoded", error) from error

    def _require_pixels(self, width: int, height: int) -> None:
        try:
            require_pixels(width, height)
        except ImageTooLargeError as error:
            raise self._failure("is too large", error) from error

    def _failure(self, what: str, why: object) -> DatasetError:
        return DatasetError(
            f"{self.path}: the image {what} ({why}). Restore the file, or remove it from the "
            "dataset; `python -m rfdetr.checks` lists all such files."
        )
