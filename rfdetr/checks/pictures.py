"""Pictures of the page: images and parts of images with their boxes and masks, as data URLs.

Pixels are decoded as in training: as stored, without EXIF rotation, deep grey levels scaled by the
range of the dataset. Every picture has a limit in bytes, which bounds the size of the page.
"""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from rfdetr.checks.check_files import STATUS_CODES
from rfdetr.checks.dataset_report import DatasetReport, Finding
from rfdetr.checks.samples import SampleImage, SampleObject
from rfdetr.data.decode import ImageFile, Levels, Pixels
from rfdetr.data.masks import Mask, rasterise
from rfdetr.errors import DatasetError

IMAGE_SIDE, IMAGE_BYTES = 320, 24_000
CROP_SIDE, CROP_BYTES = 112, 4_000
SMALL_SIDE, SMALL_BYTES = 240, 10_000
SMALLEST_CROP = 32  # pixels of the image around a tiny object
MARGIN = 8  # around an image with a box that may lie beyond it
TAGS = 15  # objects; names would hide an image with more
PER_CODE, FINDINGS, TWINS = 4, 24, 12
TWIN_CODES = ("split-near-duplicate", "split-duplicate-image", "image-duplicate")
GREY, PAPER = "hsl(0, 0%, 60%)", (200, 200, 200)
RED = "hsl(356, 85%, 50%)"


class Picture(NamedTuple):
    """A data URL with its size in pixels."""

    url: str
    width: int
    height: int


class Drawn(NamedTuple):
    """A sampled image with (name, colour, count) of its classes and what is not trained."""

    image: SampleImage
    picture: Picture
    classes: list[tuple[str, str, int]]
    untrained: int


class Twins(NamedTuple):
    """Two images that are the same or look the same, each as (split, file, picture)."""

    finding: Finding
    sides: list[tuple[str, str, Picture]]


class _View(NamedTuple):
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


def sample_pictures(images: Iterable[SampleImage], levels: Levels | None = None) -> list[Drawn]:
    """Complete images with all of their objects; `levels` are the grey levels of the dataset."""
    drawn = []
    for image in images:
        picture = _complete(image, levels)
        if picture is not None:
            trained = [o for o in image.objects if o.trained]
            counts = Counter((o.name, colour(o.label)) for o in trained)
            classes = [(name, shade, count) for (name, shade), count in counts.most_common()]
            drawn.append(Drawn(image, picture, classes, len(image.objects) - len(trained)))
    return drawn


def object_pictures(
    objects: dict[str, list[SampleImage]], levels: Levels | None = None
) -> dict[str, list[tuple[SampleImage, Picture]]]:
    """The object of each image with some of its surroundings, per class.

    Each file is decoded once, whatever the number of its objects.
    """
    by_path: dict[Path, list[SampleImage]] = {}
    for images in objects.values():
        for image in images:
            by_path.setdefault(image.path, []).append(image)
    pictures: dict[int, Picture] = {}
    for path, images in by_path.items():
        opened = _open(path, levels)
        if opened is None:
            continue
        file, pixels = opened
        for image in images:
            view = _around(image.objects[0].box, file.width, file.height)
            pictures[id(image)] = _draw(file, pixels, view, image.objects, CROP_BYTES)
    found = {
        name: [(image, pictures[id(image)]) for image in images if id(image) in pictures]
        for name, images in objects.items()
    }
    return {name: drawn for name, drawn in found.items() if drawn}


def finding_pictures(
    report: DatasetReport, dataset_dir: str | os.PathLike[str]
) -> dict[str, list[tuple[Finding, Picture]]]:
    """Code -> findings with the image and the box, four per code and 24 in all.

    Left out: findings that need no action, pairs of images, and images that cannot be decoded.
    """
    folder = Path(dataset_dir).expanduser().absolute()
    broken = {f.details.get("image") for f in report.of(*STATUS_CODES.values())}
    found: dict[str, list[tuple[Finding, Picture]]] = {}
    for finding in report.findings:
        name, code = finding.details.get("image"), finding.code
        if sum(map(len, found.values())) == FINDINGS:
            break
        if not isinstance(name, str) or name in broken or code in TWIN_CODES:
            continue
        if finding.action == "info" or len(found.get(code, ())) == PER_CODE:
            continue
        picture = _with_box(folder / name, finding.details.get("box"), report.samples.levels)
        if picture is not None:
            found.setdefault(code, []).append((finding, picture))
    return found


def twin_pictures(report: DatasetReport, dataset_dir: str | os.PathLike[str]) -> list[Twins]:
    """At most twelve pairs of images that are the same or nearly so."""
    folder = Path(dataset_dir).expanduser().absolute()
    drawn: list[Twins] = []
    for finding in sorted(report.of(*TWIN_CODES), key=lambda f: TWIN_CODES.index(f.code)):
        if len(drawn) == TWINS:
            break
        other = str(finding.details.get("other_file")), str(finding.details.get("other_split"))
        sides = []
        for file, split in ((str(finding.details.get("image")), finding.split or ""), other):
            picture = _with_box(folder / file, None, report.samples.levels)
            if picture is not None:
                sides.append((split, file, picture))
        if len(sides) == 2:
            drawn.append(Twins(finding, sides))
    return drawn


def _open(
    path: Path, levels: Levels | None, side: int | None = None
) -> tuple[ImageFile, Pixels] | None:
    """The file and its pixels, with a `side` in reduced size; None if it cannot be decoded."""
    try:
        file = ImageFile(path, levels)
        smallest = (side, side) if side else (0, 0)
        return file, file.decode(*smallest)
    except Exception:  # noqa: BLE001 - decoders of hostile files raise anything
        return None


def _complete(image: SampleImage, levels: Levels | None) -> Picture | None:
    opened = _open(image.path, levels, IMAGE_SIDE)
    if opened is None:
        return None
    file, pixels = opened
    size = _fitted(file.width, file.height, IMAGE_SIDE)
    view = _View(0, 0, file.width, file.height, *size)
    return _draw(file, pixels, view, image.objects, IMAGE_BYTES, tags=True)


def _with_box(path: Path, box: object, levels: Levels | None) -> Picture | None:
    """An image with the box of a finding, which may lie beyond it."""
    opened = _open(path, levels, SMALL_SIDE)
    if opened is None:
        return None
    file, pixels = opened
    width, height = _fitted(file.width, file.height, SMALL_SIDE)
    picture = Image.fromarray(pixels).resize((width, height))
    if isinstance(box, Sequence) and len(box) == 4:
        view = _View(0, 0, file.width, file.height, width, height)
        corners = _corners(box, view, MARGIN)
        picture = ImageOps.expand(picture, MARGIN, PAPER)
        shifted = [value + MARGIN for value in corners]
        ImageDraw.Draw(picture).rectangle(shifted, outline=RED, width=2)
    return _encode(picture, SMALL_BYTES)


def _fitted(width: float, height: float, side: int) -> tuple[int, int]:
    """The size with this longer side; at most four times as large."""
    scale = min(4.0, side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _around(box: Sequence[float], width: int, height: int) -> _View:
    """The part of an image around a box, a square where the image is large enough."""
    x, y, w, h = box
    side = max(SMALLEST_CROP, 1.5 * max(w, h))
    across, down = min(side, width), min(side, height)
    left = min(max(x + w / 2 - across / 2, 0), width - across)
    top = min(max(y + h / 2 - down / 2, 0), height - down)
    scale = CROP_SIDE / max(across, down)
    size = max(1, round(across * scale)), max(1, round(down * scale))
    return _View(left, top, left + across, top + down, *size)


def _draw(
    file: ImageFile,
    pixels: Pixels,
    view: _View,
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
        pen.rectangle(_corners(item.box, view), outline=shade, width=2)
    if tags and len(objects) <= TAGS:
        for item, shade in zip(objects, shades, strict=True):
            _write(pen, item.name, _corners(item.box, view), shade, view.width)
    return _encode(picture, limit)


def _corners(box: Sequence[float], view: _View, margin: int = 0) -> list[float]:
    """x, y, w, h of a box as corners in the picture; what lies beyond is drawn at its edge."""
    x, y, w, h = np.nan_to_num(np.asarray(box, np.float64))
    across, down = view.scale
    (left, right), (top, bottom) = sorted((x, x + w)), sorted((y, y + h))
    low = (left - view.left) * across, (top - view.top) * down
    high = (right - view.left) * across - 1, (bottom - view.top) * down - 1
    limits = view.width - 1 + margin, view.height - 1 + margin
    first = np.clip(low, -margin, limits)
    return [*first.tolist(), *np.clip(high, first, limits).tolist()]


def _mask(item: SampleObject, file: ImageFile, view: _View) -> Mask | None:
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
    corners: Sequence[float],
    shade: tuple[int, ...],
    room: int,
) -> None:
    """The name of an object at its upper left corner, if the built-in font has its letters.

    `room` is the width of the picture in pixels.
    """
    if max(map(ord, name), default=0) > 255:
        return
    text = name if len(name) <= 16 else f"{name[:14]}..."
    font = ImageFont.load_default(12)
    x = max(0.0, min(corners[0], room - 4 - pen.textlength(text, font=font)))
    y = max(0.0, corners[1] - 15)
    left, top, right, bottom = pen.textbbox((x + 2, y), text, font=font)
    pen.rectangle((left - 2, top - 2, right + 2, bottom + 2), fill=shade)
    light = sum(np.multiply(shade[:3], (0.299, 0.587, 0.114))) > 140
    pen.text((x + 2, y), text, font=font, fill="black" if light else "white")


def _encode(picture: Image.Image, limit: int) -> Picture:
    """The picture as a JPEG of at most `limit` bytes: less quality, then less pixels."""
    small = picture
    while True:
        for quality in (82, 65, 45, 30):
            stream = io.BytesIO()
            small.save(stream, "JPEG", quality=quality, optimize=True)
            if stream.tell() <= limit:
                text = base64.b64encode(stream.getvalue()).decode("ascii")
                return Picture(f"data:image/jpeg;base64,{text}", picture.width, picture.height)
        small = small.reduce(2)
