"""Images as `predict` and `preprocess` take them, as RGB pixels."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from rfdetr.data.decode import FAILURES, ImageFile, Levels, Pixels, open_image, to_rgb
from rfdetr.errors import DatasetError, InputError

ImageLike = Image.Image | npt.NDArray[np.uint8] | Tensor

URL_TIMEOUT_S = 20.0
URL_LIMIT_BYTES = 256 << 20


def read_image(source: Any, levels: Levels | None = None) -> Pixels:
    """uint8 RGB (H, W, 3) of a path, an http(s) URL, or what `rgb_pixels` takes.

    `levels` are the grey levels of 16-bit and float images that become 0 and 255. EXIF rotation is
    not applied, as in training. Warns about an image of a single colour. Raises FileNotFoundError
    for a missing file and InputError for anything that is not an image.
    """
    pixels = _read(source, levels)
    if _is_constant(pixels):
        name = source if isinstance(source, str | os.PathLike) else "The image"
        warnings.warn(
            f"{name} has one colour: {tuple(pixels[0, 0].tolist())}. Check how it was written or "
            "scaled.",
            UserWarning,
            stacklevel=2,
        )
    return pixels


def _is_constant(pixels: Pixels) -> bool:
    if (pixels[::64, ::64] != pixels[0, 0]).any():  # nearly every image ends here
        return False
    return pixels.size > 3 and not (pixels != pixels[0, 0]).any()


def _read(source: Any, levels: Levels | None) -> Pixels:
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return _fetch(source, levels)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_file():
            if path.is_dir():
                raise InputError(f"{path} is a folder: pass a list of the images in it.")
            raise FileNotFoundError(f"No image file {path.absolute()}.")
        try:
            return ImageFile(path, levels).decode()
        except DatasetError as error:
            raise InputError(str(error).split(" Restore the file", 1)[0]) from error
    if isinstance(source, Image.Image | np.ndarray | Tensor):
        return _decoded(source, levels)
    raise InputError(
        "predict takes a path, an http(s) URL, a PIL image, a uint8 array (H, W, 3), a tensor "
        f"(3, H, W) with values in 0..1, or a list of these; got {type(source).__name__}."
    )


def rgb_pixels(image: ImageLike, levels: Levels | None = None) -> Pixels:
    """uint8 RGB (H, W, 3) of a PIL image of any mode, such an array, or a tensor (3, H, W).

    Arrays and tensors are uint8, or float in 0..1 (multiplied by 255 and rounded). Raises
    InputError for anything else.
    """
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image, levels))
    if isinstance(image, Tensor):
        image = _tensor_pixels(image)
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"expected a PIL image, a uint8 array (H, W, 3) or a tensor (3, H, W), "
            f"got {type(image).__name__}."
        )
    if image.dtype.kind == "f" and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return _eight_bits(torch.from_numpy(np.ascontiguousarray(image, np.float32))).numpy()
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise InputError(
            f"expected an RGB array of shape (H, W, 3), uint8 or float in 0..1, got {image.dtype} "
            f"{tuple(image.shape)}. {_advice(image)}"
        )
    return image


def as_rgb_image(image: ImageLike) -> Image.Image:
    """An RGB PIL image of what `rgb_pixels` takes."""
    if isinstance(image, Image.Image):
        return to_rgb(image)
    return Image.fromarray(np.ascontiguousarray(rgb_pixels(image)))


def height_and_width(image: ImageLike) -> tuple[int, int]:
    """(height, width) in pixels of what `read_image` returns."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return int(image.shape[0]), int(image.shape[1])


def _advice(image: npt.NDArray[Any]) -> str:
    """What to do about an array that is not an RGB image."""
    if 0 in image.shape:
        return "The image is empty: check how it was read or cropped."
    if image.ndim == 4:
        return "Pass a batch as a list of images."
    if image.ndim == 3 and image.shape[2] == 3:
        return "Scale the values to 0..255 and convert them to uint8."
    if image.ndim == 3 and image.shape[0] == 3:
        return "Move the channels to the end: image.transpose(1, 2, 0)."
    return "Convert the image to RGB first."


def _eight_bits(image: Tensor) -> Tensor:
    """uint8 of a float image in 0..1; InputError for any other range."""
    image = image.detach().float()
    low, high = (float(v) for v in torch.aminmax(image))
    if not (low >= 0.0 and high <= 1.0):  # also true for NaN
        raise InputError(
            f"a float image must have values in 0..1, found {low:.4g}..{high:.4g}. Pass it before "
            "normalisation, divided by its largest possible value (255 for 8 bits)."
        )
    return (image * 255).round().to(torch.uint8)


def _tensor_pixels(image: Tensor) -> Pixels:
    if image.ndim != 3 or image.shape[0] != 3:
        advice = "Convert the image to RGB first."
        if image.ndim == 4:
            advice = "Pass a batch as a list of images."
        elif image.ndim == 3 and image.shape[2] == 3:
            advice = "Move the channels to the front: image.permute(2, 0, 1)."
        raise InputError(f"expected an image tensor (3, H, W), got {tuple(image.shape)}. {advice}")
    if not image.numel():
        raise InputError(f"expected an image tensor (3, H, W), got {tuple(image.shape)}: empty.")
    if image.is_floating_point():
        image = _eight_bits(image)
    pixels: Pixels = image.detach().permute(1, 2, 0).cpu().numpy()
    return pixels


def _decoded(source: ImageLike, levels: Levels | None) -> Pixels:
    try:
        return rgb_pixels(source, levels)
    except InputError:
        raise
    except FAILURES as error:  # a PIL image is decoded when it is first used
        raise InputError(f"The PIL image cannot be decoded: {error}.") from error


def _fetch(url: str, levels: Levels | None) -> Pixels:
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT_S) as response:  # noqa: S310
            data = response.read(URL_LIMIT_BYTES + 1)
    except (urllib.error.URLError, OSError) as error:
        raise InputError(f"{url} cannot be fetched: {getattr(error, 'reason', error)}.") from error
    if len(data) > URL_LIMIT_BYTES:
        raise InputError(f"{url} is larger than {URL_LIMIT_BYTES >> 20} MiB; download it first.")
    try:
        with open_image(data) as image:
            return np.asarray(to_rgb(image, levels))
    except FAILURES as error:
        raise InputError(f"{url} is not an image that can be decoded: {error}.") from error
