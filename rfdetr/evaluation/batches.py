"""What `validation_step` returns, as columns of the metric engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_api
from torch import Tensor
from torch.nn import functional as F

from rfdetr.errors import InputError
from rfdetr.evaluation.columns import Bools, Columns, Floats, Rows, make_rows

Batch = Sequence[Mapping[str, Any]]


def columns_from_batch(
    results: Batch, targets: Batch, *, max_dets: int, masks: bool = False
) -> Columns:
    """Move a batch to the CPU and flatten it.

    results: per image `scores` (n,), `labels` (n,), `boxes` (n, 4) xyxy in original pixels,
    `masks` (n, 1, H, W) bool. targets: `boxes` (m, 4) cxcywh fractions, `labels`, `image_id`,
    `orig_size` (H, W), optional `size`, `area`, `iscrowd`, and crowd regions in `crowd_boxes`
    (c, 4) xyxy in original pixels, `crowd_labels`, `crowd_masks` (RLE). Masks of the truth come as
    `mask_codes` (RLE of the original size), else from `masks` (m, h, w), scaled back.
    Of the detections the `max_dets` best of each class stay; only their masks are encoded.
    """
    if len(results) != len(targets):
        raise InputError(f"{len(results)} results for {len(targets)} targets: one each is needed.")
    ids = [_image_id(target) for target in targets]
    return Columns(
        np.array(ids, dtype=np.int64),
        _detections(results, max_dets, masks=masks),
        _truth(targets, masks=masks),
    )


def _image_id(target: Mapping[str, Any]) -> int:
    if "image_id" not in target:
        raise InputError("a target has no 'image_id'; metrics need it to count each image once.")
    return int(torch.as_tensor(target["image_id"]).reshape(-1)[0])


def _column(batch: Batch, key: str, width: int = 1) -> Floats:
    """The rows of all images as float64 (n, width), in one transfer from the device."""
    parts = [torch.as_tensor(item[key]).detach().reshape(-1, width) for item in batch]
    if not parts:
        return np.zeros((0, width))
    return np.asarray(torch.cat(parts).cpu().double().numpy())


def _detections(results: Batch, max_dets: int, *, masks: bool) -> Rows:
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
        parts = np.split(kept, np.cumsum(counts)[:-1])
        rle = [code for r, keep in zip(results, parts, strict=True) for code in _codes(r, keep)]
    return make_rows(image[kept], label[kept], box[kept], score=score[kept], rle=rle)


def _best_of_class(image: Any, label: Any, score: Floats, max_dets: int) -> Bools:
    order = np.lexsort((-score, label, image))
    new = np.r_[True, (np.diff(image[order]) != 0) | (np.diff(label[order]) != 0)]
    start = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))
    kept = np.zeros(len(order), dtype=bool)
    kept[order] = np.arange(len(order)) - start < max_dets
    return kept


def _codes(result: Mapping[str, Any], kept: Bools) -> list[dict[str, Any]]:
    if "masks" not in result:
        raise InputError("mask metrics were asked for, but a result has no 'masks'.")
    masks = result["masks"]
    if not kept.all():
        masks = masks[torch.from_numpy(np.flatnonzero(kept)).to(masks.device)]
    return encode_masks(masks.flatten(0, -3) if masks.dim() > 3 else masks)


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """COCO run-length codes of boolean masks (n, H, W)."""
    if not len(masks):
        return []
    # pycocotools reads columns first: turned on the masks' own device, one mask at a time in
    # memory order, so that no second copy is made on the CPU.
    columns_first = masks.transpose(-1, -2).to(torch.uint8).contiguous().cpu().numpy()
    return list(mask_api.encode(columns_first.T))


def _truth(targets: Batch, *, masks: bool) -> Rows:
    sizes = _column(targets, "orig_size", 2)
    parts = list(_truth_parts(targets, sizes))
    rle = [c for i, t in enumerate(targets) for c in _truth_codes(t, sizes[i])] if masks else None
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else []
    if not columns:
        return make_rows([], [], [], rle=rle)
    image, label, box, area, crowd = columns
    return make_rows(image, label, box, area=area, crowd=crowd, rle=rle)


def _truth_parts(targets: Batch, sizes: Floats) -> Iterator[tuple[Any, ...]]:
    for index, target in enumerate(targets):
        height, width = sizes[index]
        box = _rows(target["boxes"], 4) * [width, height, width, height]
        box[:, :2] -= box[:, 2:] / 2
        area = box[:, 2] * box[:, 3]
        if "area" in target:
            # The area follows the resize of the image; the size ranges are those of the file.
            scaled = _rows(target["size"], 2)[0].prod() if "size" in target else height * width
            area = _rows(target["area"], 1)[:, 0] * (height * width / scaled)
        crowd = np.zeros(len(box), dtype=bool)
        if "iscrowd" in target:
            crowd = _rows(target["iscrowd"], 1)[:, 0] > 0
        yield np.full(len(box), index), _rows(target["labels"], 1)[:, 0], box, area, crowd
        extra = _rows(target.get("crowd_boxes", ()), 4)
        if len(extra):
            extra[:, 2:] -= extra[:, :2]
            labels = _rows(target["crowd_labels"], 1)[:, 0]
            own = extra[:, 2] * extra[:, 3]
            yield np.full(len(extra), index), labels, extra, own, np.ones(len(extra), dtype=bool)


def _rows(value: Any, width: int) -> Floats:
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
        raise InputError("mask metrics were asked for, but a target has no 'masks'.")
    yield from target.get("crowd_masks", ())
