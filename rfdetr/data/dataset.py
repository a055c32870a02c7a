"""One split as a torch dataset of (image, target) pairs."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rfdetr.arrays import Integers
from rfdetr.data.augment import Augmentation
from rfdetr.data.decode import ImageFile, Levels
from rfdetr.data.geometry import (
    ImageObjects,
    Mask,
    Masks,
    View,
    clip,
    relative,
    show,
    show_mask,
    show_points,
)
from rfdetr.data.index import AnnotationIndex, PolygonOutlines
from rfdetr.data.masks import FAR, RLE, encode, fill_polygon, polygons_of, rasterise, to_rle
from rfdetr.data.packed import Target
from rfdetr.data.transforms import EvalTransform, TrainTransform
from rfdetr.errors import DatasetError

Points = npt.NDArray[np.floating[Any]]
REDUCED = 2  # from this factor on, polygons are rasterised at the size of the view


class SampleKey(NamedTuple):
    """An image, the epoch and the draw within it: everything that randomness depends on."""

    image: int
    epoch: int
    draw: int


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: tensor operations on one image are too small to gain from more."""
    threads = torch.get_num_threads()
    if threads == 1:  # always so in loader workers
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images and targets of one split.

    An item is an image (3, H, W) uint8, which `NestedTensor.normalised` makes network input on the
    device, and a target with

        boxes      (n, 4) centre x, centre y, width, height, fractions of the image
        labels, area, iscrowd   (n,); area in pixels of the resized image, iscrowd all zero
        image_id   (1,)
        orig_size, size         (2,) height, width of the file and of the image returned
        masks      (n, H, W) bool, if `masks` is set

    Crowd regions are left out. With an EvalTransform they come as `crowd_boxes` (m, 4) x0 y0 x1 y1
    in pixels of the file, `crowd_labels` (m,) and, if `masks` is set, `crowd_masks` (RLE), and the
    objects' masks in the size of the file as `mask_codes` (RLE).

    `levels` are the grey levels of 16-bit and float images, as in `ImageFile`. An item depends on
    `seed` and its key alone, not on the worker. Raises DatasetError that names
    the file.
    """

    def __init__(
        self,
        index: AnnotationIndex,
        transform: TrainTransform | EvalTransform,
        *,
        masks: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        levels: Levels | None = None,
    ) -> None:
        self.index = index
        self.transform = transform
        self.masks = masks
        self.augmentation = augmentation
        self.seed = seed
        self.levels = levels

    def __len__(self) -> int:
        return len(self.index)

    @property
    def class_names(self) -> list[str]:
        """Names in label order."""
        return list(self.index.class_names)

    @property
    def num_classes(self) -> int:
        """The smallest `ModelConfig.num_classes` that fits."""
        return self.index.num_classes

    def __getitem__(self, key: int | SampleKey) -> tuple[Tensor, Target]:
        with _one_thread():
            return self._item(key)

    def _item(self, key: int | SampleKey) -> tuple[Tensor, Target]:
        if not isinstance(key, SampleKey):
            key = SampleKey(range(len(self))[key], 0, key)
        rng = random.Random(f"{self.seed} {key.epoch} {key.draw} {key.image}")  # noqa: S311
        file = ImageFile(self.index.path(key.image), self.levels)
        view = self.transform.view(file.height, file.width, rng)
        image, view = self.transform.pixels(file, view)
        rows = self.index.rows(key.image)
        crowd = self.index.crowd[rows]
        original = self._objects(rows[~crowd], file)
        objects = show(original, view)
        masks = self._shown_masks(objects.rows, file, view) if self.masks else None
        if self.augmentation is not None:
            image, objects, masks = self._augment(image, objects, masks, rng)
        target = self._target(key.image, file, objects, masks)
        if isinstance(self.transform, EvalTransform):
            if self.masks:
                target["mask_codes"] = [encode(self._mask(int(r), file)) for r in objects.rows]
            if crowd.any():
                target |= self._crowd(rows[crowd], file)
        return image, target

    def _objects(self, rows: Integers, file: ImageFile) -> ImageObjects:
        boxes = self.index.pixel_boxes(rows, file.width, file.height)
        areas = np.zeros(len(rows), np.float32)
        if self.index.areas is not None:
            areas = self.index.areas[rows]
        objects = clip(ImageObjects(boxes, areas, rows, file.height, file.width))
        if self.index.areas is None:
            sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
            objects = ImageObjects(
                objects.boxes, sides.prod(1), objects.rows, file.height, file.width
            )
        return objects

    def _augment(
        self, image: Tensor, objects: ImageObjects, masks: Masks | None, rng: random.Random
    ) -> tuple[Tensor, ImageObjects, Masks | None]:
        assert self.augmentation is not None
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        pixels, objects, masks = self.augmentation(pixels, objects, masks, rng.getrandbits(32))
        return torch.from_numpy(pixels).permute(2, 0, 1), objects, masks

    def _target(
        self, number: int, file: ImageFile, objects: ImageObjects, masks: Masks | None
    ) -> Target:
        target: dict[str, Any] = {
            "boxes": torch.from_numpy(relative(objects)),
            "labels": torch.from_numpy(self.index.labels[objects.rows]),
            "image_id": torch.tensor([int(self.index.image_ids[number])]),
            "area": torch.from_numpy(objects.areas.astype(np.float32)),
            "iscrowd": torch.zeros(len(objects.rows), dtype=torch.int64),
            "orig_size": torch.tensor([file.height, file.width]),
            "size": torch.tensor([int(objects.height), int(objects.width)]),
        }
        if masks is not None:
            target["masks"] = torch.from_numpy(masks)
        return target

    def _crowd(self, rows: Integers, file: ImageFile) -> Target:
        boxes = self.index.pixel_boxes(rows, file.width, file.height)
        found: dict[str, Any] = {
            "crowd_boxes": torch.from_numpy(boxes),
            "crowd_labels": torch.from_numpy(self.index.labels[rows]),
        }
        if self.masks:
            found["crowd_masks"] = [self._rle(int(row), file) for row in rows]
        return found

    def _shown_masks(self, rows: Integers, file: ImageFile, view: View) -> Masks:
        shown = np.zeros((len(rows), view.out_height, view.out_width), bool)
        for place, row in enumerate(rows.tolist()):
            shown[place] = self._shown_mask(row, file, view)
        return shown

    def _shown_mask(self, row: int, file: ImageFile, view: View) -> Mask:
        """A mask in the pixels of a view; polygons in a much larger image are scaled first."""
        reduces = (
            REDUCED * view.out_height <= view.height and REDUCED * view.out_width <= view.width
        )
        polygons = self._polygons(row, file) if reduces else None
        if polygons is None:
            return show_mask(self._mask(row, file), view)
        shown = [show_points(points, view) for points in polygons]
        limit = FAR * max(view.out_height, view.out_width)
        if any(np.abs(points).max(initial=0) > limit for points in shown):
            return show_mask(self._mask(row, file), view)
        return rasterise([p.ravel().tolist() for p in shown], view.out_height, view.out_width)

    def _polygons(
        self, row: int, file: ImageFile
    ) -> Sequence[npt.NDArray[np.floating[Any]]] | None:
        """The outlines of an object, each (n, 2) in pixels of the file; None for RLE."""
        if isinstance(self.index.outlines, PolygonOutlines):
            points = self.index.outlines[row] * np.array([file.width, file.height])
            return [points if len(points) else self._corners(row, file)]
        segmentation = self._segmentation(row)
        if segmentation is None:
            return [self._corners(row, file)]
        try:
            return polygons_of(segmentation, file.height, file.width)
        except DatasetError as error:
            raise self._failure(file.path, error) from error

    def _mask(self, row: int, file: ImageFile) -> Mask:
        if isinstance(self.index.outlines, PolygonOutlines):
            points = self.index.outlines[row] * np.array([file.width, file.height])
            if not len(points):
                points = self._corners(row, file)
            return fill_polygon(points, file.height, file.width)
        segmentation = self._segmentation(row)
        if segmentation is None:
            return fill_polygon(self._corners(row, file), file.height, file.width)
        try:
            return rasterise(segmentation, file.height, file.width)
        except DatasetError as error:
            raise self._failure(file.path, error) from error

    def _corners(self, row: int, file: ImageFile) -> npt.NDArray[np.float32]:
        """Corner points (4, 2) of the box, the mask of an object without an outline."""
        x0, y0, x1, y1 = self.index.pixel_boxes(np.array([row]), file.width, file.height)[0]
        return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float32)

    def _rle(self, row: int, file: ImageFile) -> RLE:
        try:
            return to_rle(self._segmentation(row), file.height, file.width)
        except DatasetError as error:
            raise self._failure(file.path, error) from error

    def _segmentation(self, row: int) -> Any:
        if self.index.outlines is None or (
            self.index.masked is not None and not self.index.masked[row]
        ):
            return None
        return self.index.outlines[row]

    @staticmethod
    def _failure(path: Path, error: DatasetError) -> DatasetError:
        return DatasetError(f"{path}: one of its annotations cannot be rasterised: {error}")
