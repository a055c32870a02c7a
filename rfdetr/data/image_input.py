"""What `predict` takes as an image, as RGB pixels with their size."""

from __future__ import annotations

import io
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from rfdetr.data.decode import FAILURES, ImageFile, to_rgb
from rfdetr.data.transforms import ImageLike, as_picture
from rfdetr.errors import DatasetError, InputError

URL_TIMEOUT_S = 20.0
URL_LIMIT_BYTES = 256 << 20


def read_image(source: Any) -> ImageLike:
    """Pixels of a path, an http(s) URL, a PIL image, an array (H, W, 3) or a tensor (3, H, W).

    EXIF rotation is not applied, as in training. Raises FileNotFoundError for a missing file and
    InputError for anything that is no image.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return _fetch(source)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"No image file {path.absolute()}.")
        try:
            return ImageFile(path).decode()
        except DatasetError as error:
            raise InputError(str(error).split(" Restore the file", 1)[0]) from error
    if isinstance(source, Image.Image | np.ndarray | Tensor):
        return _picture(source)
    raise InputError(
        "predict takes a path, an http(s) URL, a PIL image, a uint8 array (H, W, 3), a tensor "
        f"(3, H, W) with values in 0..1, or a list of these; got {type(source).__name__}."
    )


def height_and_width(image: ImageLike) -> tuple[int, int]:
    """(height, width) of what `read_image` returns."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return int(image.shape[0]), int(image.shape[1])


def _picture(source: Image.Image | np.ndarray | Tensor) -> Image.Image:
    try:
        picture = as_picture(source)
        picture.load()
        return picture
    except InputError:
        raise
    except FAILURES as error:  # a PIL image is decoded when it is first used
        raise InputError(f"The PIL image cannot be decoded: {error}.") from error


def _fetch(url: str) -> Image.Image:
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT_S) as answer:  # noqa: S310
            data = answer.read(URL_LIMIT_BYTES + 1)
    except (urllib.error.URLError, OSError) as error:
        raise InputError(f"{url} cannot be fetched: {getattr(error, 'reason', error)}.") from error
    if len(data) > URL_LIMIT_BYTES:
        raise InputError(f"{url} is larger than {URL_LIMIT_BYTES >> 20} MiB; download it first.")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return to_rgb(image).copy()
    except FAILURES as error:
        raise InputError(f"{url} is no image that can be decoded: {error}.") from error
