"""Drawing of boxes, masks and names on images or parts of images.

Pixels are decoded as in training: as stored, without EXIF rotation, deep grey levels scaled by the
range of the dataset. Every picture has a limit in bytes, which bounds the size of the page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from rfdetr.checks.samples import SampleObject
from rfdetr.data.decode import ImageFile, Levels, Pixels
from rfdetr.data.masks import Mask, rasterise
from rfdetr.errors import DatasetError

CROP_SIDE = 112
SMALLEST_CROP = 32  # pixels of the image around a tiny object
TAGS = 15  # objects; names would hide an image with more
GREY = "hsl(0, 0%, 60%)"


class Picture(NamedTuple):
    """A data URL with its size in pixels."""

    url: str
    width: int
    height: int


class View(NamedTuple):
    """A part of an image, in pixels of the image, and the size it is drawn in."""

    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int

    @property
    def scale(self) -> tuple[float, float]:
        return self.width / (self.right - self.left), self.height / (self.bottom - self.top)


def colour(label: int) -> str:
    """A colour for the class at a place of the report, in the notation of CSS and Pillow."""
    return GREY if label < 0 else f"hsl({label * 137.508 % 360:.0f}, 90%, 52%)"


def open_image(
    path: Path, levels: Levels | None, side: int | None = None
) -> tuple[ImageFile, Pixels] | None:
    """The file and its pixels, with a `side` in reduced size; None if it cannot be decoded."""
    try:
        file = ImageFile(path, levels)
        smallest = (side, side) if side else (0, 0)
        return file, file.decode(*smallest)
    except Exception:  # noqa: BLE001 - decoders of hostile files raise anything
        return None


def fitted(width: float, height: float, side: int) -> tuple[int, int]:
    """The size with this longer side; at most four times as large."""
    scale = min(4.0, side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def around(box: Sequence[float], width: int, height: int) -> View:
    """The part of an image around a box, a square where the image is large enough."""
    x, y, w, h = box
    side = max(SMALLEST_CROP, 1.5 * max(w, h))
    across, down = min(side, width), min(side, height)
    left = min(max(x + w / 2 - across / 2, 0), width - across)
    top = min(max(y + h / 2 - down / 2, 0), height - down)
    scale = CROP_SIDE / max(across, down)
    size = max(1, round(across * scale)), max(1, round(down * scale))
    return View(left, top, left + across, top + down, *size)


def draw(
    file: ImageFile,
    pixels: Pixels,
    view: View,
    objects: Sequence[SampleObject],
    limit: int,
    *,
    tags: bool = False,
) -> Picture:
    """A part of the image with masks, boxes and, if there is room, names."""
    across, down = pixels.shape[1] / file.width, pixels.shape[0] / file.height
    part = (view.left * across, view.top * down, view.right * across, view.bottom * down)
    picture = Image.fromarray(pixels).resize((view.width, view.height), box=part)
    shades = [ImageColor.getrgb(colour(o.label) if o.trained else GREY) for o in objects]
    for item, shade in zip(objects, shades, strict=True):
        mask = _mask(item, file, view)
        if mask is not None:
            picture.paste(shade, mask=Image.fromarray(mask.astype(np.uint8) * 110))
    pen = ImageDraw.Draw(picture)
    for item, shade in zip(objects, shades, strict=True):
        pen.rectangle(corners(item.box, view), outline=shade, width=2)
    if tags and len(objects) <= TAGS:
        for item, shade in zip(objects, shades, strict=True):
            _write(pen, item.name, corners(item.box, view), shade, view.width)
    return encode_jpeg(picture, limit)


def corners(box: Sequence[float], view: View, margin: int = 0) -> list[float]:
    """x, y, w, h of a box as corners in the picture; what lies beyond is drawn at its edge."""
    x, y, w, h = np.nan_to_num(np.asarray(box, np.float64))
    across, down = view.scale
    (left, right), (top, bottom) = sorted((x, x + w)), sorted((y, y + h))
    low = (left - view.left) * across, (top - view.top) * down
    high = (right - view.left) * across - 1, (bottom - view.top) * down - 1
    limits = view.width - 1 + margin, view.height - 1 + margin
    first = np.clip(low, -margin, limits)
    return [*first.tolist(), *np.clip(high, first, limits).tolist()]


def _mask(item: SampleObject, file: ImageFile, view: View) -> Mask | None:
    """The mask of an object in the picture; None if it has none that can be read."""
    outline = item.outline
    try:
        if isinstance(outline, dict):
            complete = Image.fromarray(rasterise(outline, file.height, file.width))
            part = view[:4]
            return np.asarray(complete.convert("L").resize(view[4:], box=part)) > 127
        if not outline:
            return None
        moved = []
        for polygon in outline:
            points = np.asarray(polygon[: len(polygon) // 2 * 2], np.float64).reshape(-1, 2)
            moved.append(((points - view[:2]) * view.scale).ravel().tolist())
        return rasterise(moved, view.height, view.width)
    except (DatasetError, TypeError, ValueError):  # the checks report it
        return None


def _write(
    pen: ImageDraw.ImageDraw,
    name: str,
    box: Sequence[float],
    shade: tuple[int, ...],
    room: int,
) -> None:
    """The name of an object at the upper left of its box, if the built-in font has its letters.

    `room` is the width of the picture in pixels.
    """
    if max(map(ord, name), default=0) > 255:
        return
    text = name if len(name) <= 16 else f"{name[:7]}...{name[-6:]}"
    font = ImageFont.load_default(12)
    x = max(0.0, min(box[0], room - 4 - pen.textlength(text, font=font)))
    y = max(0.0, box[1] - 15)
    left, top, right, bottom = pen.textbbox((x + 2, y), text, font=font)
    pen.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=shade)
    light = sum(np.multiply(shade[:3], (0.299, 0.587, 0.114))) > 140
    pen.text((x + 2, y), text, font=font, fill="black" if light else "white")


def encode_jpeg(picture: Image.Image, limit: int) -> Picture:
    """The picture as a JPEG of at most `limit` bytes: lower quality, then fewer pixels."""
    small = picture
    while True:
        for quality in (82, 65, 45, 30):
            stream = io.BytesIO()
            small.save(stream, "JPEG", quality=quality, optimize=True)
            if stream.tell() <= limit:
                text = base64.b64encode(stream.getvalue()).decode("ascii")
                return Picture(f"data:image/jpeg;base64,{text}", picture.width, picture.height)
        small = small.reduce(2)
