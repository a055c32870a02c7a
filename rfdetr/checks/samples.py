"""What the page shows of a dataset beyond its numbers: images, objects, and maps of its boxes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rfdetr.arrays import Integers
from rfdetr.data.decode import Levels


class SampleObject(NamedTuple):
    """One annotation of a sampled image.

    `label` is the place of its class in the report, -1 if it has none. `box` is x, y, w, h in
    pixels, `outline` polygons in pixels or RLE as in COCO, None without a mask. `trained` is False
    for what training drops or ignores.
    """

    name: str
    label: int
    box: tuple[float, float, float, float]
    outline: Any
    trained: bool


class SampleImage(NamedTuple):
    """A decodable image and objects in it; `file` is its path relative to the dataset folder.

    `turned` says that EXIF asks viewers to rotate it.
    """

    split: str
    file: str
    path: Path
    objects: tuple[SampleObject, ...]
    turned: bool


class BoxMaps(NamedTuple):
    """Numbers of trained boxes by size and by place; of a large split, of a part of them.

    `sizes[i, j]` counts boxes by height i and width j at the model's resolution, in equal steps of
    the logarithm from 1 pixel to the resolution. `places[i, j]` counts the boxes that cover a cell
    of a grid laid over the images.
    """

    sizes: Integers
    places: Integers


@dataclass
class Samples:
    """Random images per split, random objects per class (images with one object), maps per split,
    and the grey levels of 16-bit and float images that become 0 and 255.

    Not part of the report's identity: any two compare equal, and JSON leaves them out.
    """

    images: dict[str, list[SampleImage]] = field(default_factory=dict, compare=False)
    objects: dict[str, list[SampleImage]] = field(default_factory=dict, compare=False)
    maps: dict[str, BoxMaps] = field(default_factory=dict, compare=False)
    levels: Levels | None = field(default=None, compare=False)
