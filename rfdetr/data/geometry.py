"""Boxes, areas and masks under crop, flip and resize (training specification, section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Boxes = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]  # (H, W)
Masks = npt.NDArray[np.bool_]  # (n, H, W)


class View(NamedTuple):
    """The part of a picture that is shown, in its pixels, and the size that it is shown at."""

    top: float
    left: float
    height: float
    width: float
    out_height: int
    out_width: int
    flip: bool = False


@dataclass(frozen=True)
class Shapes:
    """The objects of one picture: boxes (n, 4) x0 y0 x1 y1 in pixels; `rows` tells them apart."""

    boxes: Boxes
    areas: npt.NDArray[np.float32]
    rows: npt.NDArray[np.int64]
    height: float
    width: float

    def select(self, keep: npt.NDArray[np.bool_]) -> Shapes:
        """Those marked True."""
        return replace(self, boxes=self.boxes[keep], areas=self.areas[keep], rows=self.rows[keep])


def clip(shapes: Shapes) -> Shapes:
    """Boxes cut at the borders; those without extent go. Areas stay."""
    limits = np.array([shapes.width, shapes.height] * 2, np.float32)
    boxes = np.minimum(np.maximum(shapes.boxes, np.float32(0)), limits)
    clipped = replace(shapes, boxes=boxes)
    return clipped.select((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))


def crop(shapes: Shapes, top: float, left: float, height: float, width: float) -> Shapes:
    """What lies in the window; areas become those of the clipped boxes."""
    shift = np.array([left, top, left, top], np.float32)
    moved = replace(shapes, boxes=shapes.boxes - shift, height=height, width=width)
    inside = clip(moved)
    sides = inside.boxes[:, 2:] - inside.boxes[:, :2]
    return replace(inside, areas=sides[:, 0] * sides[:, 1])


def flip(shapes: Shapes) -> Shapes:
    """Mirrored left to right."""
    boxes = shapes.boxes.copy()
    boxes[:, [0, 2]] = np.float32(shapes.width) - boxes[:, [2, 0]]
    return replace(shapes, boxes=boxes)


def resize(shapes: Shapes, height: int, width: int) -> Shapes:
    """Scaled per axis; areas by the product."""
    x, y = np.float32(width / shapes.width), np.float32(height / shapes.height)
    scale = np.array([x, y, x, y], np.float32)
    return replace(
        shapes, boxes=shapes.boxes * scale, areas=shapes.areas * (x * y), height=height, width=width
    )


def relative(shapes: Shapes) -> Boxes:
    """Boxes as centre x, centre y, width, height in fractions of the picture."""
    low, high = shapes.boxes[:, :2], shapes.boxes[:, 2:]
    scale = np.array([shapes.width, shapes.height] * 2, np.float32)
    return np.concatenate([(low + high) / 2, high - low], axis=1, dtype=np.float32) / scale


def show(shapes: Shapes, view: View) -> Shapes:
    """The objects as a view shows them."""
    whole = (0, 0, shapes.height, shapes.width)
    if (view.top, view.left, view.height, view.width) != whole:
        shapes = crop(shapes, view.top, view.left, view.height, view.width)
    shapes = resize(shapes, view.out_height, view.out_width)
    return flip(shapes) if view.flip else shapes


def show_mask(mask: Mask, view: View) -> Mask:
    """A mask (H, W) as a view shows it: the nearest pixel."""
    y = view.top + (np.arange(view.out_height) + 0.5) * (view.height / view.out_height)
    x = view.left + (np.arange(view.out_width) + 0.5) * (view.width / view.out_width)
    if view.flip:
        x = x[::-1]
    rows = y.astype(np.int64).clip(0, mask.shape[0] - 1)
    columns = x.astype(np.int64).clip(0, mask.shape[1] - 1)
    shown: Mask = mask[rows[:, None], columns[None, :]]
    return shown
