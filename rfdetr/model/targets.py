"""The targets of a batch, checked and concatenated into flat tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rfdetr.errors import InputError
from rfdetr.model.types import ImageTarget

_SHOWN = 8  # problems listed in one message


class TargetMasks(NamedTuple):
    """Masks of T targets, top left on a canvas of the size of the largest one."""

    masks: Tensor  # (T, Hmax, Wmax) bool
    sizes: Tensor  # (T, 2) float32, height and width of each mask without the canvas


class FlatTargets(NamedTuple):
    """The T targets of all images, one image after the other."""

    counts: list[int]  # per image
    counts_on_device: Tensor  # (B,) int64, the same
    batch_idx: Tensor  # (T,) int64, index of the image
    slot: Tensor  # (T,) int64, position within the image
    labels: Tensor  # (T,) int64
    boxes: Tensor  # (T, 4) float32 cxcywh
    masks: TargetMasks | None

    @property
    def total(self) -> int:
        """Number of targets in the batch."""
        return sum(self.counts)


def flatten_targets(
    targets: Sequence[ImageTarget], batch: int, device: torch.device, *, with_masks: bool
) -> FlatTargets:
    """Concatenate the targets of `batch` images on `device`.

    Reads shapes but no values, so it does not wait for an accelerator. Raises InputError for
    shapes that do not fit; `raise_value_problems` checks the values.
    """
    _check_shapes(targets, batch, with_masks=with_masks)
    counts = [len(target["labels"]) for target in targets]
    batch_idx = np.repeat(np.arange(batch), counts)
    slot = np.concatenate([np.arange(n) for n in counts])
    packed = np.concatenate([batch_idx, slot, counts]).astype(np.int64)
    on_device = torch.from_numpy(packed).to(device, non_blocking=True)
    order = on_device[: 2 * len(slot)].view(2, -1)  # (2, T)
    return FlatTargets(
        counts,
        counts_on_device=on_device[2 * len(slot) :],
        batch_idx=order[0],
        slot=order[1],
        labels=torch.cat([target["labels"] for target in targets]).to(device, torch.int64),
        boxes=torch.cat([target["boxes"] for target in targets]).to(device, torch.float32),
        masks=_stack_masks(targets, device) if with_masks else None,
    )


def raise_value_problems(
    labels: np.ndarray, boxes: np.ndarray, targets: FlatTargets, num_outputs: int
) -> None:
    """Raise InputError for a label outside 0..num_outputs-1 or an invalid box.

    `labels` (T,) float32 and `boxes` (T, 4) are those of `targets`, copied to the host.
    """
    bad_label = ~((labels >= 0) & (labels < num_outputs))
    bad_box = ~np.isfinite(boxes).all(axis=1) | (boxes[:, 2:] < 0).any(axis=1)
    found = np.flatnonzero(bad_label | bad_box)
    if not len(found):
        return
    batch_idx, slot, exact = (
        part.tolist() for part in (targets.batch_idx, targets.slot, targets.labels)
    )
    lines = []
    for i in found[:_SHOWN].tolist():
        where = f"image {batch_idx[i]} of the batch, target {slot[i]}"
        if bad_label[i]:
            lines.append(f"{where}: label {exact[i]} is not within 0..{num_outputs - 1}")
        if bad_box[i]:
            box = boxes[i].tolist()
            lines.append(f"{where}: box {box} has a non-finite number or a negative size")
    more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    raise InputError(
        "Targets do not fit the model: " + "; ".join(lines) + more + ". The class head has "
        f"{num_outputs} outputs (num_classes + 1); increase num_classes or correct the labels. "
        "Boxes are (cx, cy, w, h) as fractions of the image."
    )


def _check_shapes(targets: Sequence[ImageTarget], batch: int, *, with_masks: bool) -> None:
    if len(targets) != batch:
        raise InputError(f"{len(targets)} targets for a batch of {batch} images; pass one each.")
    needed = ["labels", "boxes", *(["masks"] if with_masks else [])]
    problems = []
    for i, target in enumerate(targets):
        missing = [name for name in needed if name not in target]
        if missing:
            hint = " (a segmentation model needs masks)" if "masks" in missing else ""
            problems.append(f"target {i} lacks {', '.join(missing)}{hint}")
            continue
        count = target["labels"].numel()
        if target["labels"].ndim != 1 or target["labels"].is_floating_point():
            problems.append(f"target {i}: labels must be integers of shape (n,)")
        if tuple(target["boxes"].shape) != (count, 4):
            problems.append(f"target {i}: boxes {tuple(target['boxes'].shape)}, not ({count}, 4)")
        if with_masks and (target["masks"].ndim != 3 or len(target["masks"]) != count):
            problems.append(
                f"target {i}: masks {tuple(target['masks'].shape)}, not ({count}, H, W)"
            )
    if problems:
        raise InputError("Targets cannot be used: " + "; ".join(problems[:_SHOWN]) + ".")


def _stack_masks(targets: Sequence[ImageTarget], device: torch.device) -> TargetMasks:
    masks = [target["masks"].to(torch.bool) for target in targets]  # each (n, H, W)
    height, width = (max(mask.shape[axis] for mask in masks) for axis in (1, 2))
    padded = [
        mask
        if mask.shape[1:] == (height, width)
        else F.pad(mask, (0, width - mask.shape[2], 0, height - mask.shape[1]))
        for mask in masks
    ]
    sizes = [[float(side) for side in mask.shape[1:]] for mask in masks for _ in range(len(mask))]
    rows = torch.tensor(sizes, dtype=torch.float32).reshape(-1, 2)
    return TargetMasks(torch.cat(padded).to(device), rows.to(device, non_blocking=True))
