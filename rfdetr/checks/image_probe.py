"""Facts about one image file: read, measured and fully decoded, without trusting it."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec.structs import replace
from PIL import Image, UnidentifiedImageError

from rfdetr.data.decode import (
    MAX_PIXELS,
    ImageTooLargeError,
    Levels,
    describe_content,
    open_image,
    require_pixels,
    to_rgb,
)
from rfdetr.data.text import read_file

PROBE_VERSION = 5  # part of the cache key: increase it when a field or its meaning changes
THUMB_SIDE = 16
MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"RIFF", "WEBP"),
    (b"BM", "BMP"),
    (b"GIF8", "GIF"),
)

# Modes that convert to RGB without losing what the detector sees.
PLAIN_MODES = frozenset({"RGB", "L", "P", "RGBA", "1", "LA", "PA", "RGBX"})

Status = Literal["ok", "missing", "empty", "unreadable", "truncated", "bomb"]
# An image whose levels differ by less than FLAT_RANGE or stay below DARK_LEVEL shows nothing.
FLAT_RANGE = 3
DARK_LEVEL = 12


class ImageFacts(msgspec.Struct, frozen=True, array_like=True):
    """Everything the checks need to know about one image; sizes are before EXIF rotation.

    `dhash` is a 64-bit difference hash, `thumb` 16 x 16 gray bytes, `mean` the RGB mean in 0..255;
    they are empty if the image could not be decoded. `flat` says that nothing can be seen in it.
    """

    status: Status
    detail: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    orientation: int = 1
    frames: int = 1
    dhash: int = 0
    thumb: bytes = b""
    mean: tuple[float, float, float] | None = None
    flat: str = ""


def read_content(path: str) -> tuple[bytes, str, ImageFacts | None]:
    """Bytes and SHA-256 of a file; if it cannot be read, the facts that say so."""
    try:
        data = read_file(Path(path))
    except FileNotFoundError:
        return b"", "", ImageFacts("missing")
    except (OSError, ValueError) as error:
        return b"", "", ImageFacts("unreadable", _text(error))
    if not data:
        return b"", "", ImageFacts("empty")
    return data, hashlib.sha256(data).hexdigest(), None


def probe_bytes(
    data: bytes, max_pixels: int = MAX_PIXELS, levels: Levels | None = None
) -> ImageFacts:
    """Facts of one image in memory; a decompression bomb is recognised by its header.

    `levels` are the grey levels of 16-bit and float images that become 0 and 255.
    """
    if not data:
        return ImageFacts("empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _probe_open(open_image(data), data, max_pixels, levels)
        except ImageTooLargeError as error:
            return ImageFacts("bomb", _text(error))
        except UnidentifiedImageError:
            return _unopened(data, describe_content(data))
        except Exception as error:  # noqa: BLE001 - decoders of hostile files raise anything
            return _unopened(data, _text(error))


def _unopened(data: bytes, detail: str) -> ImageFacts:
    for magic, name in MAGIC:
        if data.startswith(magic) and not _ends_properly(name, data):
            return ImageFacts("truncated", f"the file ends within the {name} header", format=name)
    return ImageFacts("unreadable", detail)


def _probe_open(
    image: Image.Image, data: bytes, max_pixels: int, levels: Levels | None
) -> ImageFacts:
    facts = ImageFacts(
        "ok",
        format=image.format or "",
        mode=image.mode,
        width=image.width,
        height=image.height,
    )
    try:
        require_pixels(image.width, image.height, max_pixels)
    except ImageTooLargeError as error:
        return replace(facts, status="bomb", detail=_text(error))
    facts = replace(facts, orientation=_orientation(image), frames=_frames(image))
    try:
        image.load()
    except Exception as error:  # noqa: BLE001 - decoders of hostile files raise anything
        text = _text(error)
        cut = "truncated" in text.lower() or not _ends_properly(image.format, data)
        return replace(facts, status="truncated" if cut else "unreadable", detail=text)
    return _with_pixels(facts, image, levels)


def _with_pixels(facts: ImageFacts, image: Image.Image, levels: Levels | None) -> ImageFacts:
    complete = to_rgb(image, levels)
    small = complete.resize((36, 32), Image.Resampling.BOX)
    rgb = np.asarray(small, np.float64)
    gray = (rgb * (0.299, 0.587, 0.114)).sum(axis=2)
    cells = gray.reshape(8, 4, 9, 4).mean(axis=(1, 3))
    bits = np.packbits(cells[:, 1:] > cells[:, :-1])
    thumb = small.convert("L").resize((THUMB_SIDE, THUMB_SIDE), Image.Resampling.BOX)
    red, green, blue = rgb.mean(axis=(0, 1)).round(2).tolist()
    return replace(
        facts,
        dhash=int.from_bytes(bits.tobytes(), "big"),
        thumb=thumb.tobytes(),
        mean=(red, green, blue),
        flat=_flatness(complete, small),
    )


def _flatness(image: Image.Image, small: Image.Image) -> str:
    """Why nothing can be seen in an RGB image, else an empty text; `small` is its thumbnail."""

    def describe(extrema: Any) -> str:
        if max(high for _, high in extrema) < DARK_LEVEL:
            return f"nearly black: no level above {max(high for _, high in extrema)} of 255"
        if max(high - low for low, high in extrema) < FLAT_RANGE:
            return f"one colour: {tuple(low for low, _ in extrema)}"
        return ""

    # The means in a thumbnail lie within the levels, so that few images need the second look.
    return describe(small.getextrema()) and describe(image.getextrema())


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # noqa: BLE001 - a broken EXIF block does not make the image unusable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _frames(image: Image.Image) -> int:
    if image.format == "MPO":  # further images of a stereo or panorama JPEG, never an animation
        return 1
    return int(getattr(image, "n_frames", 1))


def _ends_properly(format_name: str | None, data: bytes) -> bool:
    """Whether a file that cannot be decoded has its end, that is, was damaged and not shortened."""
    if format_name in ("JPEG", "MPO"):
        return data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")
    if format_name == "PNG":
        return b"IEND" in data
    if format_name == "WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    if format_name == "BMP":
        return len(data) >= int.from_bytes(data[2:6], "little")
    if format_name == "GIF":
        return data.rstrip(b"\x00").endswith(b"\x3b")
    return True


def _text(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
