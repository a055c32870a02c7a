"""Boxes, areas and masks under crop, flip and resize."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rfdetr.arrays import Integers

Boxes = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]  # (H, W)
Masks = npt.NDArray[np.bool_]  # (n, H, W)


class View(NamedTuple):
    """A crop of an image, in pixels of the image, the size it is resized to, and a mirror flag."""

    top: float
    left: float
    height: float
    width: float
    out_height: int
    out_width: int
    flip: bool = False


@dataclass(frozen=True)
class ImageObjects:
    """The objects of one image of size `height` x `width`, all in pixels of that image."""

    boxes: Boxes  # (n, 4) x0 y0 x1 y1
    areas: npt.NDArray[np.float32]  # (n,)
    rows: Integers  # (n,) rows of the AnnotationIndex, which identify the objects
    height: float
    width: float

    def select(self, keep: npt.NDArray[np.bool_]) -> ImageObjects:
        """The objects marked True."""
        return replace(self, boxes=self.boxes[keep], areas=self.areas[keep], rows=self.rows[keep])


def clip(objects: ImageObjects) -> ImageObjects:
    """Boxes clipped to the image; objects left without extent are dropped. Areas are kept."""
    limits = np.array([objects.width, objects.height] * 2, np.float32)
    boxes = np.minimum(np.maximum(objects.boxes, np.float32(0)), limits)
    clipped = replace(objects, boxes=boxes)
    return clipped.select((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))


def crop(
    objects: ImageObjects, top: float, left: float, height: float, width: float
) -> ImageObjects:
    """The objects within a window; areas become those of the clipped boxes."""
    shift = np.array([left, top, left, top], np.float32)
    moved = replace(objects, boxes=objects.boxes - shift, height=height, width=width)
    inside = clip(moved)
    sides = inside.boxes[:, 2:] - inside.boxes[:, :2]
    return replace(inside, areas=sides[:, 0] * sides[:, 1])


def flip(objects: ImageObjects) -> ImageObjects:
    """The objects mirrored left to right."""
    boxes = objects.boxes.copy()
    boxes[:, [0, 2]] = np.float32(objects.width) - boxes[:, [2, 0]]
    return replace(objects, boxes=boxes)


def resize(objects: ImageObjects, height: int, width: int) -> ImageObjects:
    """The objects scaled per axis; areas scale by the product."""
    x, y = np.float32(width / objects.width), np.float32(height / objects.height)
    scale = np.array([x, y, x, y], np.float32)
    return replace(
        objects,
        boxes=objects.boxes * scale,
        areas=objects.areas * (x * y),
        height=height,
        width=width,
    )


def relative(objects: ImageObjects) -> Boxes:
    """Boxes (n, 4) as centre x, centre y, width, height, fractions of the image."""
    low, high = objects.boxes[:, :2], objects.boxes[:, 2:]
    scale = np.array([objects.width, objects.height] * 2, np.float32)
    return np.concatenate([(low + high) / 2, high - low], axis=1, dtype=np.float32) / scale


def show(objects: ImageObjects, view: View) -> ImageObjects:
    """The objects in the pixels of a view; those outside are dropped."""
    if (view.top, view.left, view.height, view.width) != (0, 0, objects.height, objects.width):
        objects = crop(objects, view.top, view.left, view.height, view.width)
    objects = resize(objects, view.out_height, view.out_width)
    return flip(objects) if view.flip else objects


def show_points(points: npt.NDArray[np.floating], view: View) -> npt.NDArray[np.float64]:
    """Points (n, 2) x, y of the image in the pixels of a view; they may lie outside of it."""
    scale = [view.out_width / view.width, view.out_height / view.height]
    shown = (points - [view.left, view.top]) * scale
    if view.flip:
        shown[:, 0] = view.out_width - shown[:, 0]
    return shown


def show_mask(mask: Mask, view: View) -> Mask:
    """A mask (H, W) in the pixels of a view, by nearest neighbour."""
    y = view.top + (np.arange(view.out_height) + 0.5) * (view.height / view.out_height)
    x = view.left + (np.arange(view.out_width) + 0.5) * (view.width / view.out_width)
    if view.flip:
        x = x[::-1]
    rows = y.astype(np.int64).clip(0, mask.shape[0] - 1)
    columns = x.astype(np.int64).clip(0, mask.shape[1] - 1)
    shown: Mask = mask[rows[:, None], columns[None, :]]
    return shown
