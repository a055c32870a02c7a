"""The targets of a batch as flat tensors, checked (model specification, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rfdetr.errors import InputError

_SHOWN = 8  # problems listed in one message


class FlatTargets(NamedTuple):
    """Targets of all images, one after the other."""

    counts: list[int]  # per image
    image: Tensor  # (T,) int64
    slot: Tensor  # (T,) int64, position within its image
    labels: Tensor  # (T,) int64
    boxes: Tensor  # (T, 4) float32 cxcywh
    masks: Tensor | None  # (T, Hmax, Wmax) bool
    mask_sizes: Tensor | None  # (T, 2) float32 height, width of the target's own mask

    @property
    def total(self) -> int:
        """Number of targets in the batch."""
        return sum(self.counts)


def flatten_targets(
    targets: Sequence[dict[str, Any]], batch: int, device: torch.device, *, with_masks: bool
) -> FlatTargets:
    """Concatenate the targets of `batch` images on `device`.

    Reads shapes only, never values, so it does not wait for an accelerator. Raises InputError for
    shapes that do not fit; values are checked by `value_problems`.
    """
    _check_shapes(targets, batch, with_masks=with_masks)
    counts = [len(target["labels"]) for target in targets]
    image = np.repeat(np.arange(batch), counts)
    slot = np.concatenate([np.arange(n) for n in counts])
    order = torch.from_numpy(np.stack([image, slot]).astype(np.int64)).to(device, non_blocking=True)
    masks, sizes = _stack_masks(targets, device) if with_masks else (None, None)
    return FlatTargets(
        counts,
        order[0],
        order[1],
        torch.cat([target["labels"] for target in targets]).to(device, torch.int64),
        torch.cat([target["boxes"] for target in targets]).to(device, torch.float32),
        masks,
        sizes,
    )


def value_problems(flat: FlatTargets, outputs: int) -> Tensor:
    """(T,) float32 on the device: 1 for a label outside 0..outputs-1, plus 2 for a bad box."""
    label = (flat.labels < 0) | (flat.labels >= outputs)
    box = ~flat.boxes.isfinite().all(dim=-1) | (flat.boxes[:, 2:] < 0).any(dim=-1)
    return label.float() + 2 * box.float()


def raise_value_problems(codes: np.ndarray, flat: FlatTargets, outputs: int) -> None:
    """Raise InputError when `value_problems`, now on the host, found any."""
    found = np.flatnonzero(codes)
    if not len(found):
        return
    image, slot, labels, boxes = (
        part.tolist() for part in (flat.image, flat.slot, flat.labels, flat.boxes)
    )
    lines = []
    for i in found[:_SHOWN].tolist():
        where = f"image {image[i]} of the batch, target {slot[i]}"
        if int(codes[i]) & 1:
            lines.append(f"{where}: label {labels[i]} is not within 0..{outputs - 1}")
        if int(codes[i]) & 2:
            lines.append(f"{where}: box {boxes[i]} has a non-finite number or a negative size")
    more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    raise InputError(
        "Targets do not fit the model: " + "; ".join(lines) + more + ". The class head has "
        f"{outputs} outputs (num_classes + 1); raise num_classes or correct the labels. Boxes are "
        "(cx, cy, w, h) as fractions of the image."
    )


def _check_shapes(targets: Sequence[dict[str, Any]], batch: int, *, with_masks: bool) -> None:
    if len(targets) != batch:
        raise InputError(f"{len(targets)} targets for a batch of {batch} images; give one each.")
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
            problems.append(f"target {i}: labels must be whole numbers of shape (n,)")
        if tuple(target["boxes"].shape) != (count, 4):
            problems.append(f"target {i}: boxes {tuple(target['boxes'].shape)}, not ({count}, 4)")
        if with_masks and (target["masks"].ndim != 3 or len(target["masks"]) != count):
            problems.append(
                f"target {i}: masks {tuple(target['masks'].shape)}, not ({count}, H, W)"
            )
    if problems:
        raise InputError("Targets cannot be used: " + "; ".join(problems[:_SHOWN]) + ".")


def _stack_masks(targets: Sequence[dict[str, Any]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Masks on the canvas of the largest one, and the own size of each."""
    masks = [target["masks"].to(torch.bool) for target in targets]
    height, width = (max(mask.shape[axis] for mask in masks) for axis in (1, 2))
    padded = [
        mask
        if mask.shape[1:] == (height, width)
        else F.pad(mask, (0, width - mask.shape[2], 0, height - mask.shape[1]))
        for mask in masks
    ]
    sizes = [[float(side) for side in mask.shape[1:]] for mask in masks for _ in range(len(mask))]
    rows = torch.tensor(sizes, dtype=torch.float32).reshape(-1, 2)
    return torch.cat(padded).to(device), rows.to(device, non_blocking=True)
