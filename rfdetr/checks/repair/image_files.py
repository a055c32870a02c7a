"""Repairs of image files."""

from __future__ import annotations

import io
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from PIL import Image

from rfdetr.checks.image_probe import probe_bytes
from rfdetr.data.decode import FORMAT_SUFFIXES, to_rgb

PREFERRED_SUFFIX = {
    "JPEG": ".jpg",
    "MPO": ".jpg",
    "TIFF": ".tif",
    "PPM": ".ppm",
    "JPEG2000": ".jp2",
}
APP1, START_OF_SCAN = 0xE1, 0xDA


def renamed(folder: Path, name: str, format_name: str) -> str:
    """An unused name with the extension of the format, in the folder of `name`."""
    path = PurePosixPath(name)
    suffix = PREFERRED_SUFFIX.get(format_name) or min(FORMAT_SUFFIXES[format_name])
    wanted, number = path.with_suffix(suffix), 1
    while (folder / wanted).exists():
        wanted = path.with_name(f"{path.stem}-{number}{suffix}")
        number += 1
    return wanted.as_posix()


def repaired_image(path: Path, repairs: Collection[str]) -> bytes | None:
    """The bytes of the repaired image, None if the file cannot be changed."""
    data = path.read_bytes()
    facts = probe_bytes(data)
    if facts.status != "ok":
        return None
    if "convert-rgb" not in repairs and facts.format in ("JPEG", "MPO"):
        return without_exif(data)
    with Image.open(io.BytesIO(data)) as image:
        pixels = to_rgb(image).copy() if "convert-rgb" in repairs else image.copy()
    stream = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if facts.format in ("JPEG", "MPO") else {}
    pixels.info.clear()
    pixels.getexif().clear()
    pixels.save(stream, "JPEG" if facts.format == "MPO" else facts.format, **options)
    return stream.getvalue()


def without_exif(data: bytes) -> bytes:
    """A JPEG without its EXIF blocks; the pixels are unchanged."""
    parts, place = [data[:2]], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != START_OF_SCAN:
        length = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        block = data[place : place + length]
        if not (block[1] == APP1 and block[4:10] == b"Exif\0\0"):
            parts.append(block)
        place += length
    return b"".join([*parts, data[place:]])
