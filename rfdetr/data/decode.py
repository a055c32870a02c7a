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
Levels = tuple[float, float]  # grey levels of 16-bit and float images that become 0 and 255

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
    (4, b"ftypavi", "a damaged AVIF image"),
    (4, b"ftyp", "a video; extract its frames"),
    (8, b"AVI ", "a video; extract its frames"),
    (0, b"version https://git-lfs", "a pointer of Git LFS; run `git lfs pull`"),
    (0, b"outs:", "a DVC file; run `dvc pull`"),
    (0, b"\x1f\x8b", "a gzip archive; unpack it"),
    (0, b"PK\3\4", "a ZIP archive; unpack it"),
    (0, b"\0\5\x16\7", "metadata of macOS; remove the file, whose name may start with ._"),
    (0, b"\0\0\1\0", "an icon, which is not read; convert it to PNG"),
    (0, b"\x93NUMPY", "a NumPy array; save it as PNG or TIFF"),
    (128, b"DICM", "a DICOM image, which is not read; convert it to PNG"),
    (0, b"8BPS", "a Photoshop file; export it as PNG"),
    (0, b"\xff\x0a", "JPEG XL, which is not read; convert it to PNG or JPEG"),
    (0, b"\0\0\0\x0cJXL", "JPEG XL, which is not read; convert it to PNG or JPEG"),
    (0, b"%PDF", "a PDF document; export its pages as PNG"),
)
OTHER_TEXT: tuple[tuple[bytes, str], ...] = (
    (b"<svg", "an SVG drawing; export it as PNG"),
    (b"<!doctype html", "a web page, not an image (a failed download?)"),
    (b"<html", "a web page, not an image (a failed download?)"),
    (b"<?xml", "an XML document, not an image (a failed download?)"),
    (b"{", "JSON text, not an image (a failed download?)"),
)
HEADS = (JPEG_START, b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")


def describe_content(data: bytes) -> str:
    """What a file is that no image format accepts."""
    found = [text for at, magic, text in OTHER_CONTENT if data.startswith(magic, at)]
    start = data[:256].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    found += [text for magic, text in OTHER_TEXT if start.startswith(magic)]
    if not data.strip(b"\0"):
        found.append("nothing but zero bytes: it was not copied completely")
    starts = [place for head in HEADS if (place := data.find(head, 0, 256)) > 0]
    if starts:
        found.append(f"an image behind {min(starts)} other bytes: it was damaged when copied")
    return found[0] if found else "no known image format"


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


def is_deep(mode: str) -> bool:
    """Whether images of a mode of Pillow have grey levels of more than 8 bits."""
    return mode == "F" or mode.startswith("I")


def to_rgb(image: Image.Image, levels: Levels | None = None) -> Image.Image:
    """Convert any PIL mode to RGB; deep grey levels are scaled to 8 bits, alpha is dropped."""
    if image.mode == "RGB":
        return image
    if is_deep(image.mode):
        return Image.fromarray(eight_bit_levels(np.asarray(image), levels)).convert("RGB")
    return image.convert("RGB")


def eight_bit_levels(
    grey: npt.NDArray[np.generic], levels: Levels | None = None
) -> npt.NDArray[np.uint8]:
    """Grey levels of a 16-bit, 32-bit or float image as 8 bits.

    `levels` become 0 and 255, what lies beyond is clipped; without them, those of `usual_levels`
    for the image itself. NaN becomes the smallest level, an infinity the nearest finite one.
    """
    values = grey.astype(np.float64)
    low, high = finite_range(values)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    low, high = levels or usual_levels(low, high, is_float=grey.dtype.kind == "f")
    scale = 255 / (high - low) if high > low else 0.0
    scaled: npt.NDArray[np.float64] = ((values - low) * scale).clip(0, 255)
    return np.rint(scaled).astype(np.uint8)


def finite_range(values: npt.NDArray[np.floating]) -> tuple[float, float]:
    """The smallest and the largest finite value; zeros if there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def usual_levels(low: float, high: float, *, is_float: bool) -> Levels:
    """The levels that become 0 and 255 where grey levels range from `low` to `high`.

    The levels decide, not the number type, which says nothing about a 12-bit camera or a thermal
    sensor: 0..255 for levels within it, 0..1 for floats within it, else the range itself.
    """
    if is_float and low >= 0 and high <= 1:
        return 0.0, 1.0
    return (0.0, 255.0) if low >= 0 and high <= 255 else (low, high)


class ImageFile:
    """An image file whose size is read before its pixels are decoded.

    `height` and `width` are in pixels, `levels` are those of `eight_bit_levels`. Raises
    DatasetError that names the file if it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], levels: Levels | None = None) -> None:
        self.path = Path(path)
        self.levels = levels
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
                return np.asarray(to_rgb(image, self.levels))
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
