"""The grey levels of a dataset of 16-bit or float images, which its model keeps.

Each image scaled by its own range would look alike whatever was measured: a cold thermal image as
bright as a hot one. So all are scaled by the range of the training images.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np

from rfdetr.data.decode import (
    FAILURES,
    FORMAT_SUFFIXES,
    Levels,
    finite_range,
    is_deep,
    open_image,
    usual_levels,
)

SAMPLE = 256  # images of which the range is taken, evenly over the split
DEEP_SUFFIXES = frozenset().union(
    *(FORMAT_SUFFIXES[name] for name in ("PNG", "TIFF", "PPM", "JPEG2000"))
)


def dataset_levels(paths: Iterable[str | os.PathLike[str]]) -> Levels | None:
    """The levels that become 0 and 255 in the images of a dataset; None if all have 8 bits.

    They come from up to SAMPLE images, by the rule of `usual_levels`. Files that cannot be read
    are left out.
    """
    able = [p for p in paths if os.path.splitext(p)[1].lower() in DEEP_SUFFIXES]  # noqa: PTH122
    chosen = [able[i] for i in np.linspace(0, len(able) - 1, min(SAMPLE, len(able))).astype(int)]
    ranges = [found for path in chosen if (found := _grey_range(path)) is not None]
    if not ranges:
        return None
    lows, highs, floats = zip(*ranges, strict=True)
    return usual_levels(min(lows), max(highs), is_float=all(floats))


def _grey_range(path: str | os.PathLike[str]) -> tuple[float, float, bool] | None:
    """Smallest and largest level of a deep image, and whether they are floats."""
    try:
        with open(path, "rb") as stream, open_image(stream.read()) as image:
            if not is_deep(image.mode):
                return None
            grey = np.asarray(image)
    except FAILURES:
        return None
    return (*finite_range(grey.astype(np.float64)), grey.dtype.kind == "f")
