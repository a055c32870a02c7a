"""The outputs of validation steps as tables for the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools import mask as mask_api
from torch import Tensor
from torch.nn import functional as F

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.errors import InputError
from rfdetr.evaluation.box_table import BoxTable, EvaluationData, make_box_table
from rfdetr.model.postprocess import resize_masks

Batch = Sequence[Mapping[str, Any]]
PIXELS_AT_ONCE = 1 << 23  # of resized masks: 40 MiB of logits and masks, or one mask


class BatchTruth(NamedTuple):
    """The ground truth of a batch: image ids (B,), and its boxes."""

    image_ids: Integers
    boxes: BoxTable


def truth_from_batch(targets: Batch, *, masks: bool = False) -> BatchTruth:
    """The ground truth of `targets`, as `data_from_batch` takes them."""
    ids = [_image_id(target) for target in targets]
    return BatchTruth(np.array(ids, dtype=np.int64), _truth(targets, masks=masks))


def data_from_batch(
    results: Batch,
    targets: Batch,
    *,
    max_dets: int,
    masks: bool = False,
    truth: BatchTruth | None = None,
) -> EvaluationData:
    """Move a batch to the CPU and flatten it.

    results, per image: `scores` (n,), `labels` (n,), `boxes` (n, 4) xyxy in original pixels, and
    for masks either `masks` (n, 1, H, W) bool, or `mask_logits` (Q, h, w) with `queries` (n,), from
    which masks of the original size are made and encoded a few at a time. targets, per image:
    `boxes` (m, 4) cxcywh as fractions, `labels` (m,), `image_id`, `orig_size` (H, W); optional
    `size` (h, w), `area` (m,), `iscrowd` (m,), and crowd regions as `crowd_boxes` (c, 4) xyxy in
    original pixels, `crowd_labels` (c,), `crowd_masks` (RLE). Ground-truth masks come from
    `mask_codes` (RLE in the original size) or else from `masks` (m, h, w), scaled back. `truth` is
    what `truth_from_batch` gave for these targets. Only the `max_dets` best detections of each
    image and class are kept, and only their masks are encoded. Raises InputError for missing keys.
    """
    if len(results) != len(targets):
        raise InputError(
            f"{len(results)} results for {len(targets)} targets: one each is required."
        )
    if truth is None:
        truth = truth_from_batch(targets, masks=masks)
    found = _detections(results, targets, max_dets, masks=masks)
    return EvaluationData(truth.image_ids, found, truth.boxes)


def _image_id(target: Mapping[str, Any]) -> int:
    if "image_id" not in target:
        raise InputError("a target has no 'image_id'; metrics need it to count each image once.")
    return int(torch.as_tensor(target["image_id"]).reshape(-1)[0])


def _column(batch: Batch, key: str, width: int = 1) -> Floats:
    """The values of all images as float64 (n, width), in one transfer from the device."""
    parts = [torch.as_tensor(item[key]).detach().reshape(-1, width) for item in batch]
    if not parts:
        return np.zeros((0, width))
    return np.asarray(torch.cat(parts).cpu().double().numpy())


def _detections(results: Batch, targets: Batch, max_dets: int, *, masks: bool) -> BoxTable:
    counts = [len(result["scores"]) for result in results]
    image = np.repeat(np.arange(len(results)), counts)
    score = _column(results, "scores")[:, 0]
    label = _column(results, "labels")[:, 0].astype(np.int64)
    box = _column(results, "boxes", 4)
    box[:, 2:] -= box[:, :2]
    kept = np.ones(len(score), dtype=bool)
    if max(counts, default=0) > max_dets:
        kept = _best_of_class(image, label, score, max_dets)
    rle = None
    if masks:
        parts = np.split(kept, np.cumsum(counts))[:-1]
        sizes = _column(targets, "orig_size", 2).astype(int).tolist()
        images = zip(results, parts, sizes, strict=True)
        rle = [code for r, keep, size in images for code in _codes(r, keep, size)]
    return make_box_table(image[kept], label[kept], box[kept], score=score[kept], rle=rle)


def _best_of_class(image: Integers, label: Integers, score: Floats, max_dets: int) -> Bools:
    """Whether each detection is among the `max_dets` best of its image and class."""
    order = np.lexsort((-score, label, image))
    new = np.r_[True, (np.diff(image[order]) != 0) | (np.diff(label[order]) != 0)]
    start = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    kept = np.zeros(len(order), dtype=bool)
    kept[order] = np.arange(len(order)) - start < max_dets
    return kept


def _codes(result: Mapping[str, Any], kept: Bools, size: Sequence[int]) -> list[dict[str, Any]]:
    chosen = np.flatnonzero(kept)
    if "mask_logits" in result:
        return _codes_of_logits(result["mask_logits"], result["queries"][chosen], *size)
    if "masks" not in result:
        raise InputError("mask metrics were requested, but a result has no 'masks'.")
    masks = result["masks"]
    if not kept.all():
        masks = masks[torch.from_numpy(chosen).to(masks.device)]
    return encode_masks(masks.flatten(0, -3) if masks.dim() > 3 else masks)


def _codes_of_logits(
    logits: Tensor, queries: Tensor, height: int, width: int
) -> list[dict[str, Any]]:
    """RLE of the masks of `queries`, each query resized and encoded once, a few at a time."""
    unique, inverse = np.unique(queries.cpu().numpy(), return_inverse=True)
    codes: list[dict[str, Any]] = []
    for chunk in torch.split(torch.from_numpy(unique), max(1, PIXELS_AT_ONCE // (height * width))):
        codes += encode_masks(resize_masks(logits[chunk], height, width)[:, 0])
    return [codes[place] for place in inverse.tolist()]


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Compressed COCO RLE of boolean masks (n, H, W)."""
    if not len(masks):
        return []
    if masks.device.type != "cpu":
        return encode_on_device(masks)
    # pycocotools reads column-major masks
    columns_first = masks.transpose(-1, -2).to(torch.uint8).contiguous().numpy()
    return list(mask_api.encode(columns_first.T))


def encode_on_device(masks: Tensor) -> list[dict[str, Any]]:
    """As `encode_masks`; the runs are found on the masks' device, and only they are copied."""
    n, height, width = masks.shape
    columns = masks.transpose(-1, -2).reshape(n, height * width)  # RLE counts along columns
    starts = torch.empty_like(columns)  # where a run of the other value starts
    starts[:, :1] = columns[:, :1]
    torch.ne(columns[:, 1:], columns[:, :-1], out=starts[:, 1:])
    row, first = starts.nonzero().T.cpu().numpy()
    parts = np.split(first, np.searchsorted(row, np.arange(1, n)))
    return [
        mask_api.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
        for counts in (np.diff(part, prepend=0, append=height * width) for part in parts)
    ]


def _truth(targets: Batch, *, masks: bool) -> BoxTable:
    sizes = _column(targets, "orig_size", 2)
    parts = list(_truth_parts(targets, sizes))
    rle = [c for i, t in enumerate(targets) for c in _truth_codes(t, sizes[i])] if masks else None
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else []
    if not columns:
        return make_box_table([], [], [], rle=rle)
    image, label, box, area, crowd = columns
    return make_box_table(image, label, box, area=area, crowd=crowd, rle=rle)


def _truth_parts(targets: Batch, sizes: Floats) -> Iterator[tuple[Any, ...]]:
    for index, target in enumerate(targets):
        height, width = sizes[index]
        box = _array(target["boxes"], 4) * [width, height, width, height]
        box[:, :2] -= box[:, 2:] / 2
        area = box[:, 2] * box[:, 3]
        if "area" in target:
            # `area` is in pixels of the resized image; the area ranges are in original pixels.
            scaled = _array(target["size"], 2)[0].prod() if "size" in target else height * width
            area = _array(target["area"], 1)[:, 0] * (height * width / scaled)
        crowd = np.zeros(len(box), dtype=bool)
        if "iscrowd" in target:
            crowd = _array(target["iscrowd"], 1)[:, 0] > 0
        yield np.full(len(box), index), _array(target["labels"], 1)[:, 0], box, area, crowd
        extra = _array(target.get("crowd_boxes", ()), 4)
        if len(extra):
            extra[:, 2:] -= extra[:, :2]
            labels = _array(target["crowd_labels"], 1)[:, 0]
            crowd_area = extra[:, 2] * extra[:, 3]
            yield (
                np.full(len(extra), index),
                labels,
                extra,
                crowd_area,
                np.ones(len(extra), dtype=bool),
            )


def _array(value: Any, width: int) -> Floats:
    tensor = torch.as_tensor(value).detach().cpu().double().reshape(-1, width)
    return np.array(tensor.numpy())


def _truth_codes(target: Mapping[str, Any], size: Floats) -> Iterator[dict[str, Any]]:
    height, width = int(size[0]), int(size[1])
    if "mask_codes" in target:
        yield from target["mask_codes"]
    elif "masks" in target:
        masks = target["masks"]
        if len(masks) and masks.shape[-2:] != (height, width):
            masks = masks[:, None].float()
            masks = F.interpolate(masks, (height, width), mode="nearest-exact")[:, 0]
        yield from encode_masks(masks > 0)
    else:
        raise InputError("mask metrics were requested, but a target has no 'masks'.")
    yield from target.get("crowd_masks", ())
