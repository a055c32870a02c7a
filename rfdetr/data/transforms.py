"""Pixels to network input.

`preprocess` is used by validation, test, prediction, export and serving; `TrainTransform` draws
the random views of training, the augmentation of DETR (Carion et al., 2020).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from rfdetr.data.batch import MEAN, STD, normalise
from rfdetr.data.decode import ImageFile, Pixels
from rfdetr.data.geometry import View
from rfdetr.data.image_input import ImageLike, rgb_pixels

__all__ = ["MEAN", "STD", "EvalTransform", "TrainTransform", "normalise", "preprocess", "resize"]

LONGEST = 1333  # limit of the longer side when the aspect ratio is kept
SHORT_SIDES = (400, 500, 600)
CROP_SIDES = (384, 600)
REDUCE = 2  # a JPEG may be decoded reduced to no less than this many pixels per output pixel


def preprocess(image: ImageLike, resolution: int | tuple[int, int]) -> Tensor:
    """Resize to (resolution, resolution), or to (height, width), and normalise.

    `image` is a PIL image of any mode, a uint8 RGB array (H, W, 3), or a tensor (3, H, W): uint8,
    or float in 0..1 (rounded to 8 bits first, so that every kind of input gives the same result).
    Returns float32 (3, H', W'): `resize`, then (value / 255 - mean) / std with the ImageNet
    statistics. Raises InputError.
    """
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    return normalise(resize(as_tensor(rgb_pixels(image)), size))


def as_tensor(pixels: Pixels) -> Tensor:
    """(H, W, 3) as a tensor (3, H, W): a view, or a copy of a read-only or mirrored array."""
    viewable = pixels.flags.writeable and min(pixels.strides) >= 0
    return torch.from_numpy(pixels if viewable else pixels.copy()).permute(2, 0, 1)


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 (3, H, W) to (3, height, width): bilinear with antialias, on the pixels' own device.

    On a CPU the kernel of torchvision for uint8; a GPU computes in float32 and rounds. They and
    Pillow differ by at most one grey level on photos, by two in a few of a million values on noise.
    """
    resized: Tensor = V.resize(pixels, list(size), antialias=True)
    return resized


def keep_aspect(height: int, width: int, short: int) -> tuple[int, int]:
    """(height, width) with the shorter side `short`, or less so that the longer is <= 1333."""
    low, high = min(height, width), max(height, width)
    if short * high / low > LONGEST:
        short = round(LONGEST * low / high)
    long = round(short * high / low) if short else LONGEST
    short = max(1, short)
    return (short, long) if height <= width else (long, short)


class EvalTransform:
    """The entire image at the model's resolution."""

    def __init__(self, resolution: int, *, square: bool = True) -> None:
        self.resolution = resolution
        self.square = square

    def view(self, height: int, width: int, _rng: random.Random | None = None) -> View:
        """The view of an image: square, or with its aspect ratio kept."""
        size = (self.resolution, self.resolution)
        if not self.square:
            size = keep_aspect(height, width, self.resolution)
        return View(0, 0, height, width, *size)

    def pixels(self, file: ImageFile, view: View) -> tuple[Tensor, View]:
        """uint8 (3, h, w)."""
        return resize(as_tensor(file.decode()), (view.out_height, view.out_width)), view


class TrainTransform:
    """A random view: the entire image or a square crop, at a random size, mirrored or not.

    `sizes` are the sides to choose from. As in DETR, the crop has 384 to 600 pixels of the image
    with its shorter side resized to 400, 500 or 600; here both resizes are one. All randomness
    comes from the generator passed to `view`.
    """

    def __init__(self, sizes: Sequence[int], *, square: bool = True, mirror: bool = True) -> None:
        self.sizes = list(sizes)
        self.square = square
        self.mirror = mirror

    def view(self, height: int, width: int, rng: random.Random) -> View:
        """Draw a view of an image of the given size."""
        size = rng.choice(self.sizes)
        uncropped = rng.random() < 0.5
        part = (0, 0, height, width) if uncropped else self._crop(height, width, rng)
        mirrored = self.mirror and rng.random() < 0.5
        out = (size, size) if self.square else keep_aspect(part[2], part[3], size)
        return View(*part, *out, mirrored)

    @staticmethod
    def _crop(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the crop in original pixels."""
        short = rng.choice(SHORT_SIDES)
        scale = min(height, width) / short
        side = rng.randint(*(min(bound, short) for bound in CROP_SIDES))
        spare_y, spare_x = (round(n / scale) - side for n in (height, width))
        top, left = rng.randint(0, max(0, spare_y)), rng.randint(0, max(0, spare_x))
        own = max(1, round(side * scale))
        own_top = min(round(top * scale), height - own)
        own_left = min(round(left * scale), width - own)
        return own_top, own_left, own, own

    def pixels(self, file: ImageFile, view: View) -> tuple[Tensor, View]:
        """uint8 (3, h, w), and the view rounded to pixels of the possibly reduced decoding."""
        ratio_y, ratio_x = (
            REDUCE * out / own
            for out, own in ((view.out_height, view.height), (view.out_width, view.width))
        )
        pixels = file.decode(math.ceil(file.height * ratio_y), math.ceil(file.width * ratio_x))
        y, x = pixels.shape[0] / file.height, pixels.shape[1] / file.width
        top, left = int(view.top * y), int(view.left * x)
        height, width = max(1, round(view.height * y)), max(1, round(view.width * x))
        height, width = min(height, pixels.shape[0] - top), min(width, pixels.shape[1] - left)
        part = as_tensor(np.ascontiguousarray(pixels[top : top + height, left : left + width]))
        image = resize(part, (view.out_height, view.out_width))
        shown = View(top / y, left / x, height / y, width / x, *view[4:])
        return (V.horizontal_flip(image) if view.flip else image), shown
