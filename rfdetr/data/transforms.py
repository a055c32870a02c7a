"""Pixels to network input: one function for validation, test, prediction, export and serving."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from rfdetr.data.decode import Pixels, to_rgb
from rfdetr.errors import InputError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

ImageLike = Image.Image | npt.NDArray[np.uint8] | Tensor


def preprocess(image: ImageLike, resolution: int | tuple[int, int]) -> Tensor:
    """Resize to (resolution, resolution), or to (height, width), and normalise.

    `image` is a PIL image of any mode, a uint8 RGB array (H, W, 3), or a tensor (3, H, W): uint8,
    or float in 0..1 (rounded to 8 bits first, so that every kind of input gives the same result).
    Returns float32 (3, H', W'). Bilinear with antialias as Pillow does it, then
    (value / 255 - mean) / std with the ImageNet statistics. Raises InputError.
    """
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    picture = as_picture(image)
    if picture.size != (size[1], size[0]):
        picture = picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return normalise(torch.from_numpy(np.array(picture)).permute(2, 0, 1))


def as_picture(image: ImageLike) -> Image.Image:
    """An RGB PIL image from any input that `preprocess` takes."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Tensor):
        image = _tensor_pixels(image)
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"expected a PIL image, a uint8 array (H, W, 3) or a tensor (3, H, W), "
            f"got {type(image).__name__}."
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(
            f"expected a uint8 RGB array of shape (H, W, 3), got {image.dtype} "
            f"{tuple(image.shape)}. Convert the image to RGB first."
        )
    return Image.fromarray(np.ascontiguousarray(image))


def _tensor_pixels(image: Tensor) -> Pixels:
    if image.ndim != 3 or image.shape[0] != 3:
        raise InputError(f"expected an image tensor (3, H, W), got {tuple(image.shape)}.")
    if image.is_floating_point():
        low, high = (float(v) for v in torch.aminmax(image.detach().float()))
        if not (low >= 0.0 and high <= 1.0):  # also true for NaN
            raise InputError(
                f"a float image must have values in 0..1, found {low:.4g}..{high:.4g}. "
                "Pass it before normalisation, divided by 255."
            )
        image = (image.detach().float() * 255).round().to(torch.uint8)
    pixels: Pixels = image.detach().permute(1, 2, 0).cpu().numpy()
    return pixels


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (3, H, W) to float32 (3, H, W): (value / 255 - mean) / std."""
    mean = torch.tensor(MEAN).mul(255).view(3, 1, 1)
    scale = torch.tensor(STD).mul(255).reciprocal().view(3, 1, 1)
    out = torch.empty(pixels.shape, dtype=torch.float32)
    return out.copy_(pixels).sub_(mean).mul_(scale)
