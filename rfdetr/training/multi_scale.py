"""One random square size per optimizer step, applied to a batch that is already on its device."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch.nn.functional as F

from rfdetr.data.batch import NestedTensor


def draw_size(sizes: Sequence[int], global_step: int) -> int:
    """The size of optimizer step `global_step`: equal on all ranks, in a window and on resume."""
    return random.Random(global_step).choice(sizes)  # noqa: S311


def resize_batch(batch: NestedTensor, size: int) -> None:
    """Resize images and mask to (size, size) in place (training specification, section 5.4).

    Targets need no change: their boxes are fractions and their masks keep the data set's size.
    """
    if batch.tensors.shape[-2:] == (size, size):
        return
    batch.tensors = F.interpolate(
        batch.tensors, size=(size, size), mode="bilinear", align_corners=False
    )
    if batch.mask is not None:
        mask = F.interpolate(batch.mask[:, None].float(), size=(size, size), mode="nearest")
        batch.mask = mask[:, 0].bool()
