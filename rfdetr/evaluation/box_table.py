"""Detections and ground truth of many images as flat arrays, the input of the metrics.

One row is one box. Boxes are x, y, width, height in original pixels, float64. The arrays come from
validation batches (`batches.py`) or from COCO documents; they pickle compactly, so distributed
ranks exchange them as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from rfdetr.arrays import Bools, Floats, Integers, find_rows
from rfdetr.data.masks import mask_areas, to_rle
from rfdetr.errors import InputError

IouType = Literal["bbox", "segm"]


@dataclasses.dataclass(frozen=True)
class BoxTable:
    """Boxes of one kind, detections or ground truth.

    image: (n,) position of the image in `EvaluationData.image_ids`. label: (n,).
    box: (n, 4) x, y, width, height. area: (n,) pixels. score: (n,), zeros for ground truth.
    crowd: (n,), False for detections. rle: (n,) compressed COCO RLE masks, or None.
    """

    image: Integers
    label: Integers
    box: Floats
    area: Floats
    score: Floats
    crowd: Bools
    rle: NDArray[np.object_] | None

    def __len__(self) -> int:
        return len(self.image)

    def take(self, index: Integers | Bools) -> BoxTable:
        """The rows at `index`, in that order."""
        return BoxTable(
            image=self.image[index],
            label=self.label[index],
            box=self.box[index],
            area=self.area[index],
            score=self.score[index],
            crowd=self.crowd[index],
            rle=None if self.rle is None else self.rle[index],
        )

    def with_mask_areas(self) -> BoxTable:
        """The same rows with the area of each mask, in pixels."""
        if self.rle is None:
            return self
        return dataclasses.replace(self, area=mask_areas(list(self.rle)))


@dataclasses.dataclass(frozen=True)
class EvaluationData:
    """Images `image_ids` (I,), ascending, with their detections and ground truth."""

    image_ids: Integers
    detections: BoxTable
    truth: BoxTable


def make_box_table(
    image: Any,
    label: Any,
    box: Any,
    *,
    area: Any = None,
    score: Any = None,
    crowd: Any = None,
    rle: Iterable[Any] | None = None,
) -> BoxTable:
    """A table from array-likes; without `area` it is the area of the box.

    A row with the score NaN is not a detection and is dropped.
    """
    images = np.asarray(image, dtype=np.int64)
    boxes = np.asarray(box, dtype=np.float64).reshape(-1, 4)
    count = len(images)
    objects = None
    if rle is not None:
        objects = np.empty(count, dtype=object)
        objects[:] = list(rle)
    scores = np.zeros(count) if score is None else np.asarray(score, dtype=np.float64)
    table = BoxTable(
        image=images,
        label=np.asarray(label, dtype=np.int64),
        box=boxes,
        area=boxes[:, 2] * boxes[:, 3] if area is None else np.asarray(area, dtype=np.float64),
        score=scores,
        crowd=np.zeros(count, dtype=bool) if crowd is None else np.asarray(crowd, dtype=bool),
        rle=objects,
    )
    undefined = np.isnan(scores)
    return table.take(~undefined) if undefined.any() else table


def concatenate(parts: Sequence[EvaluationData]) -> EvaluationData:
    """All images of `parts` in ascending id; of repeated ids only the first is kept.

    Repeats are normal: a distributed sampler pads its ranks with images of other ranks.
    """
    if not parts:
        empty = make_box_table([], [], [])
        return EvaluationData(np.zeros(0, dtype=np.int64), empty, empty)
    offsets = np.cumsum([0, *(len(part.image_ids) for part in parts)])
    every_id = np.concatenate([part.image_ids for part in parts])
    image_ids, first = np.unique(every_id, return_index=True)
    new_index = np.full(len(every_id), -1)
    new_index[first] = np.arange(len(first))

    def joined(tables: Sequence[BoxTable]) -> BoxTable:
        old = np.concatenate([t.image + o for t, o in zip(tables, offsets[:-1], strict=True)])
        masks = [t.rle for t in tables if t.rle is not None]
        table = BoxTable(
            image=new_index[old],
            label=np.concatenate([t.label for t in tables]),
            box=np.concatenate([t.box for t in tables]),
            area=np.concatenate([t.area for t in tables]),
            score=np.concatenate([t.score for t in tables]),
            crowd=np.concatenate([t.crowd for t in tables]),
            rle=np.concatenate(masks) if sum(map(len, masks)) == len(old) and masks else None,
        )
        return table if len(first) == len(every_id) else table.take(table.image >= 0)

    return EvaluationData(
        image_ids, joined([p.detections for p in parts]), joined([p.truth for p in parts])
    )


def data_from_coco(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    masks: bool = False,
) -> EvaluationData:
    """Read a COCO ground-truth document and a list in COCO results format, both as parsed JSON.

    Rows keep the order of the documents. Raises InputError when a result names an image that the
    ground truth does not have, or when `masks` is set and a row has no segmentation.
    """
    sizes = {i["id"]: (i.get("height"), i.get("width")) for i in ground_truth["images"]}
    image_ids = np.array(sorted(sizes), dtype=np.int64)
    truth = list(ground_truth.get("annotations", ()))
    boxed = bool(results) and bool(results[0].get("bbox"))
    det_rle = [_rle(r, sizes) for r in results] if masks else None
    boxes = [r["bbox"] for r in results] if boxed or det_rle is None else _boxes_of(det_rle)
    detections = make_box_table(
        _image_rows(image_ids, results),
        [r["category_id"] for r in results],
        boxes,
        score=[r["score"] for r in results],
        # As COCO.loadRes of pycocotools: a result with a box takes its area, also for masks.
        area=None if boxed or det_rle is None else mask_areas(det_rle),
        rle=det_rle,
    )
    return EvaluationData(
        image_ids,
        detections,
        make_box_table(
            _image_rows(image_ids, truth),
            [a["category_id"] for a in truth],
            [a["bbox"] for a in truth],
            area=[a.get("area", a["bbox"][2] * a["bbox"][3]) for a in truth],
            crowd=[bool(a.get("iscrowd")) for a in truth],
            rle=[_rle(a, sizes) for a in truth] if masks else None,
        ),
    )


def _image_rows(image_ids: Integers, entries: Sequence[Mapping[str, Any]]) -> Integers:
    given = np.fromiter((e["image_id"] for e in entries), dtype=np.int64, count=len(entries))
    rows = find_rows(image_ids, given)
    if (rows < 0).any():
        unknown = np.unique(given[rows < 0])
        raise InputError(
            f"{len(unknown)} image ids are not in the ground truth's 'images', first "
            f"{unknown[:5].tolist()}; evaluate results against the split they were made on."
        )
    return rows


def _boxes_of(rles: list[dict[str, Any]]) -> Any:
    return mask_api.toBbox(rles) if rles else []


def _rle(entry: Mapping[str, Any], sizes: Mapping[int, tuple[Any, Any]]) -> dict[str, Any]:
    segmentation = entry.get("segmentation")
    if not segmentation:
        raise InputError(
            f"entry {entry.get('id', '')} of image {entry['image_id']} has no 'segmentation'; "
            "mask metrics need one in every entry."
        )
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], bytes):  # made by pycocotools in this process
            return dict(segmentation)
        return to_rle(segmentation, *segmentation["size"])
    return to_rle(segmentation, *sizes[entry["image_id"]])
