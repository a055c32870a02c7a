"""A batch of images with its padding mask, and the collate function that builds it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from rfdetr.data.packed import PackedTargets, Target
from rfdetr.errors import InputError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (..., 3, H, W) to float32: (value / 255 - mean) / std, on the device of the pixels."""
    mean, scale = _statistics(pixels.device)
    out = torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device)
    return out.copy_(pixels).sub_(mean).mul_(scale)


@functools.cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation (3, 1, 1) of pixel values in 0..255."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values).mul(255).view(3, 1, 1) for values in (MEAN, STD))
        return mean.to(device), std.reciprocal().to(device)


class NestedTensor:
    """A batch of images, padded to one size.

    `tensors` is (B, 3, H, W): float, or uint8 as loaders pass it; `normalised` makes it float.
    `mask` is (B, H, W) bool with True on padding, or None.
    `padded` is False when the host knows that nothing is padded; the network then skips the mask.
    Reading it from the mask would synchronise with the accelerator.
    """

    def __init__(self, tensors: Tensor, mask: Tensor | None, *, padded: bool | None = None) -> None:
        self.tensors = tensors
        self.mask = mask
        self.padded = mask is not None if padded is None else padded

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in page-locked host memory."""
        return self._map(lambda tensor: tensor.pin_memory())

    def normalised(self) -> Self:
        """The batch as float32 network input with zeros as padding; unchanged if it is float."""
        if self.tensors.dtype != torch.uint8:
            return self
        tensors = normalise(self.tensors)
        if self.padded and self.mask is not None:
            tensors.masked_fill_(self.mask[:, None], 0)
        return type(self)(tensors, self.mask, padded=self.padded)

    def decompose(self) -> tuple[Tensor, Tensor | None]:
        """(tensors, mask)."""
        return self.tensors, self.mask

    @property
    def device(self) -> torch.device:
        return self.tensors.device

    def __len__(self) -> int:
        return self.tensors.shape[0]

    def __repr__(self) -> str:
        return f"NestedTensor({tuple(self.tensors.shape)}, padded={self.padded})"

    def _map(self, move: Any) -> Self:
        mask = None if self.mask is None else move(self.mask)
        return type(self)(move(self.tensors), mask, padded=self.padded)


def pad_images(images: Sequence[Tensor], block_size: int = 1) -> NestedTensor:
    """Pad images (3, h, w) at the right and bottom with zeros to one size (B, 3, H, W).

    H and W are the largest h and w, rounded up to multiples of `block_size`. There is no mask if
    nothing is padded. Raises InputError for an empty list and for images of another shape.
    """
    if not images:
        raise InputError("The batch has no images; pass at least one.")
    wrong = [i for i, image in enumerate(images) if image.ndim != 3 or image.shape[0] != 3]
    if wrong:
        shapes = ", ".join(f"image {i}: {tuple(images[i].shape)}" for i in wrong[:5])
        raise InputError(f"Images must be (3, height, width) tensors; found {shapes}.")
    sizes = {tuple(image.shape[1:]) for image in images}
    height, width = (
        -(-max(size[axis] for size in sizes) // block_size) * block_size for axis in (0, 1)
    )
    if sizes == {(height, width)}:
        return NestedTensor(torch.stack(list(images)), None)
    tensors = images[0].new_zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        tensors[i, :, : image.shape[1], : image.shape[2]] = image
        mask[i, : image.shape[1], : image.shape[2]] = False
    return NestedTensor(tensors, mask)


def collate(
    samples: Sequence[tuple[Tensor, Target]], block_size: int = 1
) -> tuple[NestedTensor, PackedTargets]:
    """Batch (image, target) pairs; the targets keep their values, packed into one tensor per key.

    `block_size` is patch size x windows per side; bind it with `functools.partial`.
    """
    images = pad_images([image for image, _ in samples], block_size)
    return images, PackedTargets([target for _, target in samples])
