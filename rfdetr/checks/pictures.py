"""Pictures of the page: images and parts of images with their boxes and masks, as data URLs.

Every picture has a limit in bytes, which bounds the size of the page.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageOps

from rfdetr.checks.check_files import STATUS_CODES
from rfdetr.checks.dataset_report import DatasetReport, Finding
from rfdetr.checks.drawing import (
    Picture,
    View,
    around,
    colour,
    corners,
    draw,
    encode_jpeg,
    fitted,
    open_image,
)
from rfdetr.checks.samples import SampleImage
from rfdetr.data.decode import Levels

IMAGE_SIDE, IMAGE_BYTES = 320, 24_000
CROP_BYTES = 4_000
SMALL_SIDE, SMALL_BYTES = 240, 10_000
MARGIN = 8  # around an image with a box that may lie beyond it
PER_CODE, FINDINGS, TWINS = 4, 24, 12
TWIN_CODES = ("split-near-duplicate", "split-duplicate-image", "image-duplicate")
PAPER = (200, 200, 200)
RED = "hsl(356, 85%, 50%)"


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
        opened = open_image(path, levels)
        if opened is None:
            continue
        file, pixels = opened
        for image in images:
            view = around(image.objects[0].box, file.width, file.height)
            pictures[id(image)] = draw(file, pixels, view, image.objects, CROP_BYTES)
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


def _complete(image: SampleImage, levels: Levels | None) -> Picture | None:
    opened = open_image(image.path, levels, IMAGE_SIDE)
    if opened is None:
        return None
    file, pixels = opened
    size = fitted(file.width, file.height, IMAGE_SIDE)
    view = View(0, 0, file.width, file.height, *size)
    return draw(file, pixels, view, image.objects, IMAGE_BYTES, tags=True)


def _with_box(path: Path, box: object, levels: Levels | None) -> Picture | None:
    """An image with the box of a finding, which may lie beyond it."""
    opened = open_image(path, levels, SMALL_SIDE)
    if opened is None:
        return None
    file, pixels = opened
    width, height = fitted(file.width, file.height, SMALL_SIDE)
    picture = Image.fromarray(pixels).resize((width, height))
    if isinstance(box, Sequence) and len(box) == 4:
        view = View(0, 0, file.width, file.height, width, height)
        edges = corners(box, view, MARGIN)
        picture = ImageOps.expand(picture, MARGIN, PAPER)
        shifted = [value + MARGIN for value in edges]
        ImageDraw.Draw(picture).rectangle(shifted, outline=RED, width=2)
    return encode_jpeg(picture, SMALL_BYTES)
