"""Multi-scale training: the sizes, the size of each optimizer step, and the resize of a batch."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from rfdetr.data.batch import NestedTensor


def multi_scale_sizes(resolution: int, block_size: int, expanded: bool = True) -> list[int]:
    """Image sides for training, ascending: multiples of `block_size` around `resolution`."""
    offsets = range(-5, 6) if expanded else range(-3, 5)
    blocks = (resolution // block_size + offset for offset in offsets)
    return [n * block_size for n in blocks if n >= 2]


def draw_size(sizes: Sequence[int], global_step: int) -> int:
    """The size of optimizer step `global_step`.

    It depends on the step alone, so it is the same on all ranks, for all micro-batches of the step
    and after a resume; runs with other seeds draw the same sequence.
    """
    return random.Random(global_step).choice(sizes)  # noqa: S311


def resize_batch(nested: NestedTensor | Tensor, size: int) -> None:
    """Resize a batch in place to (size, size): bilinear without antialias; the mask nearest.

    uint8 images are normalised first.
    """
    if isinstance(nested, Tensor):
        nested.data = F.interpolate(nested, (size, size), mode="bilinear", align_corners=False)
        return
    images = nested.normalised().tensors
    nested.tensors = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    if nested.mask is not None:
        mask = F.interpolate(nested.mask[None].float(), (size, size), mode="nearest")
        nested.mask = mask[0].bool()
