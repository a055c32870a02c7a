"""Detections and ground truth of many images as flat arrays, the input of the metric engine.

One row is one box. Boxes are xywh in original pixels, float64. The arrays come from validation
batches or from COCO documents; they pickle compactly, so ranks exchange them as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from rfdetr.data.masks import to_rle
from rfdetr.errors import InputError

IouType = Literal["bbox", "segm"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Rles = NDArray[np.object_]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Boxes of one kind: `image` (n,) indexes the images, `box` (n, 4) xywh, `rle` masks or None.

    `score` is used by detections, `crowd` by ground truth; the other kind holds zeros.
    """

    image: Ints
    label: Ints
    box: Floats
    area: Floats
    score: Floats
    crowd: Bools
    rle: Rles | None

    def __len__(self) -> int:
        return len(self.image)

    def take(self, index: Ints | Bools) -> Rows:
        """The rows at `index`, in that order."""
        return Rows(
            self.image[index],
            self.label[index],
            self.box[index],
            self.area[index],
            self.score[index],
            self.crowd[index],
            None if self.rle is None else self.rle[index],
        )

    def with_mask_areas(self) -> Rows:
        """The same rows with the pixels of each mask as area."""
        if self.rle is None or not len(self):
            return self
        area = np.asarray(mask_api.area(list(self.rle)), dtype=np.float64)
        return dataclasses.replace(self, area=area)


@dataclasses.dataclass(frozen=True)
class Columns:
    """Images `image_ids` (I,) with their detections and ground truth."""

    image_ids: Ints
    detections: Rows
    truth: Rows


def make_rows(
    image: Any,
    label: Any,
    box: Any,
    *,
    area: Any = None,
    score: Any = None,
    crowd: Any = None,
    rle: Iterable[Any] | None = None,
) -> Rows:
    """Rows from array-likes; a missing area is that of the box."""
    images = np.asarray(image, dtype=np.int64)
    boxes = np.asarray(box, dtype=np.float64).reshape(-1, 4)
    count = len(images)
    objects = None
    if rle is not None:
        objects = np.empty(count, dtype=object)
        objects[:] = list(rle)
    return Rows(
        images,
        np.asarray(label, dtype=np.int64),
        boxes,
        boxes[:, 2] * boxes[:, 3] if area is None else np.asarray(area, dtype=np.float64),
        np.zeros(count) if score is None else np.asarray(score, dtype=np.float64),
        np.zeros(count, dtype=bool) if crowd is None else np.asarray(crowd, dtype=bool),
        objects,
    )


def concatenate(parts: Sequence[Columns]) -> Columns:
    """All images of `parts` in ascending id; of repeated ids only the first counts.

    Repeats are normal: a distributed sampler pads the ranks with images seen elsewhere.
    """
    if not parts:
        empty = make_rows([], [], [])
        return Columns(np.zeros(0, dtype=np.int64), empty, empty)
    offsets = np.cumsum([0, *(len(part.image_ids) for part in parts)])
    every_id = np.concatenate([part.image_ids for part in parts])
    image_ids, first = np.unique(every_id, return_index=True)
    new_index = np.full(len(every_id), -1)
    new_index[first] = np.arange(len(first))

    def joined(rows: Sequence[Rows]) -> Rows:
        old = np.concatenate([r.image + o for r, o in zip(rows, offsets[:-1], strict=True)])
        masks = [r.rle for r in rows if r.rle is not None]
        whole = Rows(
            new_index[old],
            np.concatenate([r.label for r in rows]),
            np.concatenate([r.box for r in rows]),
            np.concatenate([r.area for r in rows]),
            np.concatenate([r.score for r in rows]),
            np.concatenate([r.crowd for r in rows]),
            np.concatenate(masks) if sum(map(len, masks)) == len(old) and masks else None,
        )
        return whole if len(first) == len(every_id) else whole.take(whole.image >= 0)

    return Columns(
        image_ids, joined([p.detections for p in parts]), joined([p.truth for p in parts])
    )


def columns_from_coco(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    masks: bool = False,
) -> Columns:
    """Columns of a COCO ground-truth document and a list in COCO results format.

    Rows keep the order of the documents. Raises InputError when a result names an image that the
    ground truth does not have, or when masks are asked for and a row has none.
    """
    sizes = {i["id"]: (i.get("height"), i.get("width")) for i in ground_truth["images"]}
    image_ids = np.array(sorted(sizes), dtype=np.int64)
    truth = list(ground_truth.get("annotations", ()))
    boxed = bool(results) and bool(results[0].get("bbox"))
    det_rle = [_rle(r, sizes) for r in results] if masks else None
    boxes = [r["bbox"] for r in results] if boxed or det_rle is None else _boxes_of(det_rle)
    detections = make_rows(
        _image_index(image_ids, results),
        [r["category_id"] for r in results],
        boxes,
        score=[r["score"] for r in results],
        # As pycocotools loads results: rows with a box take its area, also for masks.
        area=None if boxed or det_rle is None else mask_api.area(det_rle) if det_rle else [],
        rle=det_rle,
    )
    return Columns(
        image_ids,
        detections,
        make_rows(
            _image_index(image_ids, truth),
            [a["category_id"] for a in truth],
            [a["bbox"] for a in truth],
            area=[a.get("area", a["bbox"][2] * a["bbox"][3]) for a in truth],
            crowd=[bool(a.get("iscrowd")) for a in truth],
            rle=[_rle(a, sizes) for a in truth] if masks else None,
        ),
    )


def _image_index(image_ids: Ints, rows: Sequence[Mapping[str, Any]]) -> Ints:
    given = np.fromiter((row["image_id"] for row in rows), dtype=np.int64, count=len(rows))
    index = np.searchsorted(image_ids, given)
    known = index < len(image_ids)
    known[known] = image_ids[index[known]] == given[known]
    if not known.all():
        foreign = np.unique(given[~known])
        raise InputError(
            f"{len(foreign)} image ids are not in the ground truth's 'images', first "
            f"{foreign[:5].tolist()}; evaluate results against the split they were made on."
        )
    return index


def _boxes_of(rles: list[dict[str, Any]]) -> Any:
    return mask_api.toBbox(rles) if rles else []


def _rle(row: Mapping[str, Any], sizes: Mapping[int, tuple[Any, Any]]) -> dict[str, Any]:
    shape = row.get("segmentation")
    if not shape:
        raise InputError(
            f"row {row.get('id', '')} of image {row['image_id']} has no 'segmentation'; "
            "mask metrics need one in every row."
        )
    if isinstance(shape, dict):
        if isinstance(shape["counts"], bytes):  # made by pycocotools in this process
            return dict(shape)
        return to_rle(shape, *shape["size"])
    return to_rle(shape, *sizes[row["image_id"]])
