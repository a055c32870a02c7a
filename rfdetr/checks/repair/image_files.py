"""Repairs of image files."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from rfdetr.checks.image_probe import probe_bytes
from rfdetr.data.decode import FORMAT_SUFFIXES, ImageFile, open_image
from rfdetr.errors import DatasetError

PREFERRED_SUFFIX = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "TIFF": ".tif",
    "PPM": ".ppm",
    "JPEG2000": ".jp2",
}
CONVERTED_MODES = frozenset({"CMYK", "YCbCr", "LAB", "HSV"})  # 8 bits, so that nothing is scaled


def decodes(path: Path) -> bool:
    """Whether training can read the image."""
    try:
        ImageFile(path).decode()
    except DatasetError:
        return False
    return True


def renamed(folder: Path, name: str, format_name: str, taken: Collection[str]) -> str | None:
    """The name with the extension of the format; None if another file has it."""
    suffix = PREFERRED_SUFFIX.get(format_name) or min(FORMAT_SUFFIXES[format_name])
    wanted = PurePosixPath(name).with_suffix(suffix).as_posix()
    return None if wanted in taken or (folder / wanted).exists() else wanted


def viewed_orientation(data: bytes, annotated: tuple[Any, Any]) -> int | None:
    """The EXIF orientation of the view that the annotations follow, None if they may not.

    `annotated` is the size (width, height) that the annotations give. Only an orientation that
    swaps width and height can be proved by it.
    """
    facts = probe_bytes(data)
    if facts.status != "ok" or facts.orientation < 5 or facts.width == facts.height:
        return None
    return facts.orientation if annotated == (facts.height, facts.width) else None


def converted(data: bytes) -> bytes | None:
    """The image in RGB with its tags; None if its mode cannot be converted faithfully."""
    with open_image(data) as image:
        if image.mode not in CONVERTED_MODES:
            return None
        pixels, format_name = image.convert("RGB"), image.format or ""
        options: dict[str, Any] = {"exif": image.getexif().tobytes()}
    if format_name in ("JPEG", "MPO"):
        format_name, options = "JPEG", {**options, "quality": 95, "subsampling": 0}
    stream = io.BytesIO()
    pixels.info.clear()  # a colour profile of the old mode
    pixels.save(stream, format_name, **{key: value for key, value in options.items() if value})
    return stream.getvalue()
