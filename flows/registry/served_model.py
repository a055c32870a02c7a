"""The served model. MLflow stores and runs this file as code, so no pickle is needed.

The file is copied into the model folder, and must import `rfdetr` but nothing of `flows`. Each row
of a request is one image; boxes are x1, y1, x2, y2 in pixels. Without the parameter `threshold`,
the operating point in model.json decides, or 0.5 if there is none.

Requests come from strangers. The model reads local files only below the folders in
RFDETR_SERVE_FILES (separated by colons), and fetches URLs only from the hosts in RFDETR_SERVE_URLS
(separated by commas, see `rfdetr.data.remote_images`). By default, both are empty, and the answer
does not depend on what exists on this machine or in its network.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.pyfunc.model import PythonModel
from PIL import Image, UnidentifiedImageError

from rfdetr.data.decode import ImageTooLargeError, Levels, open_image, to_rgb
from rfdetr.data.remote_images import BusyError, UrlFetcher, listed

LARGEST_BYTES = 64 << 20
LARGEST_PIXELS = 100_000_000
DATA_URI = re.compile(r"data:[\w/+.;=-]*,", re.IGNORECASE)
PARAMS = ("threshold", "max_detections")


FOLDERS = [os.path.realpath(folder) for folder in listed("RFDETR_SERVE_FILES", os.pathsep)]
URLS = UrlFetcher(listed("RFDETR_SERVE_URLS", ","), max_bytes=LARGEST_BYTES)


class DetectorModel(PythonModel):  # type: ignore[misc]
    """Detections of images given as base64 text, data URI, bytes, array, or allowed path or URL."""

    def load_context(self, context: Any) -> None:
        """Load the weights of the model folder."""
        from rfdetr import RFDETR

        self.detector = RFDETR.from_checkpoint(context.artifacts["weights"])
        _refuse_unknown_params()

    def predict(self, context: Any, model_input, params=None):  # type: ignore[no-untyped-def] # noqa: ARG002
        # with type hints, MLflow would replace the signature and drop the parameters
        params = params or {}
        given, most = params.get("threshold"), int(params.get("max_detections", 300))
        at_point = given is None and self.detector.model.operating_point is not None
        threshold = 0.5 if given is None else float(given)
        if not 0 <= threshold < 1 or most < 1:
            raise MlflowException.invalid_parameter_value(
                f"threshold must be in [0, 1) and max_detections at least 1; found {threshold} and "
                f"{most}."
            )
        images = read_images(model_input, self.detector.model_config.grey_levels)
        least: Any = "operating_point" if at_point else threshold
        found = self.detector.predict(images, threshold=least) if images else []
        return pd.DataFrame(
            [self._row(detections, most) for detections in found],
            columns=["boxes", "scores", "labels", "names"],
        )

    def _row(self, detections: Any, most: int) -> dict[str, Any]:
        order = np.argsort(-detections.confidence, kind="stable")[:most]
        return {
            "boxes": detections.xyxy[order].astype(float).tolist(),
            "scores": detections.confidence[order].astype(float).tolist(),
            "labels": detections.class_id[order].astype(int).tolist(),
            "names": detections.data["class_name"][order].tolist(),
        }


class _UnknownParams(logging.Filter):
    """MLflow drops unknown parameters with a warning; here a request that has some is refused."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith("Unrecognized params"):
            return True
        unknown = re.findall(r"'([^']*)'", text.partition("]")[0])
        near = [m for name in unknown for m in difflib.get_close_matches(name, PARAMS, 1)]
        advice = f" Did you mean {near[0]}?" if near else ""
        raise MlflowException.invalid_parameter_value(
            f"unknown params: {', '.join(unknown)}. Known: {', '.join(PARAMS)}.{advice}"
        )


def _refuse_unknown_params() -> None:
    logger = logging.getLogger("mlflow.models.utils")  # of MLflow 3.17
    logger.setLevel(logging.WARNING)
    if not any(type(known).__name__ == _UnknownParams.__name__ for known in logger.filters):
        logger.addFilter(_UnknownParams())


def read_images(model_input: Any, levels: Levels | None = None) -> list[Image.Image]:
    """The images of a request, as `read_image`. Raises one error that lists every invalid row."""
    rows = _rows(model_input)
    fetched = _fetched(value for value in rows if _is_url(value))
    images, problems = [], []
    for index, value in enumerate(rows):
        try:
            images.append(read_image(fetched[value] if _is_url(value) else value, levels))
        except (ValueError, OSError, Image.DecompressionBombError) as error:
            problems.append(f"row {index}: {error}")
    if problems:
        raise MlflowException.invalid_parameter_value(
            "column 'image' needs base64 text of an image file, an array (height, width, 3) of "
            "uint8, or a path or http(s) URL that this server allows (RFDETR_SERVE_FILES, "
            f"RFDETR_SERVE_URLS). {'; '.join(problems)}."
        )
    return images


def _is_url(value: Any) -> bool:
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def _fetched(urls: Iterable[str]) -> dict[str, bytes | ValueError]:
    """URL -> content or problem. Raises MlflowException (503) if too many requests fetch URLs."""
    wanted = list(dict.fromkeys(urls))
    if not wanted:
        return {}
    try:
        found = URLS.fetch(wanted)
    except BusyError:
        raise MlflowException(
            "this server is fetching the URLs of other requests. Try again, or send the images "
            "themselves as base64 text.",
            error_code=TEMPORARILY_UNAVAILABLE,
        ) from None
    return {
        url: ValueError(f"{_shown(url)} {content}") if isinstance(content, ValueError) else content
        for url, content in zip(wanted, found, strict=True)
    }


def _rows(model_input: Any) -> list[Any]:
    if isinstance(model_input, pd.DataFrame):
        if "image" not in model_input.columns:
            raise MlflowException.invalid_parameter_value(
                f"column 'image' is missing; found {list(map(str, model_input.columns))}."
            )
        return [image for cell in model_input["image"] for image in _images_of(cell)]
    if isinstance(model_input, dict) and "image" in model_input:
        return _images_of(model_input["image"])
    return list(model_input) if isinstance(model_input, list) else [model_input]


def _images_of(cell: Any) -> list[Any]:
    """The images of a cell: one, or all if the request was `{"inputs": {"image": [...]}}`."""
    if isinstance(cell, np.ndarray) and cell.dtype == object:
        cell = cell.tolist()
    several = isinstance(cell, list) and cell and all(isinstance(i, str | bytes) for i in cell)
    return list(cell) if several else [cell]


def read_image(value: Any, levels: Levels | None = None) -> Image.Image:
    """One RGB image. EXIF rotation is not applied, as in training.

    `levels` are the grey levels of 16-bit and float images that become 0 and 255.

    Raises ValueError or OSError.
    """
    if isinstance(value, ValueError):
        raise value
    if isinstance(value, Image.Image):
        return to_rgb(value, levels)
    if isinstance(value, np.ndarray | list | tuple):
        return _from_array(value)
    if isinstance(value, str):
        data = _content(value)
    elif isinstance(value, bytes | bytearray):
        data = bytes(value)
    else:
        raise ValueError(f"{type(value).__name__} is not an image")  # noqa: TRY004
    try:
        with open_image(data, LARGEST_PIXELS) as image:
            return to_rgb(image, levels).copy()
    except ImageTooLargeError:
        raise
    except UnidentifiedImageError:
        raise ValueError(f"{_shown(value)} is not a readable image file") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{_shown(value)} is a broken image: {error}") from None


def _from_array(value: Any) -> Image.Image:
    try:
        array = np.array(value.tolist() if isinstance(value, np.ndarray) else value)
    except ValueError:
        array = np.zeros(0)
    if array.ndim == 2:
        array = np.stack([array] * 3, axis=-1)
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"an array of shape {array.shape} is not (height, width, 3)")
    integers = np.issubdtype(array.dtype, np.integer) or np.all(array == np.floor(array))
    if not integers or array.min() < 0 or array.max() > 255:
        raise ValueError("an array must contain integers from 0 to 255")
    return Image.fromarray(array.astype(np.uint8))


def _content(text: str) -> bytes:
    """The bytes of a data URI, of an allowed file, or of base64 text."""
    payload = text[match.end() :] if (match := DATA_URI.match(text)) else text
    path = None if match else _allowed_file(text)
    if path is not None:
        if not path.is_file():
            raise ValueError(f"{_shown(text)} is not a readable file")
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"{_shown(text)} is larger than {LARGEST_BYTES >> 20} MiB")
        return path.read_bytes()
    try:
        return base64.b64decode(re.sub(r"\s+", "", payload), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{_shown(text)} is neither base64 text nor allowed") from None


def _allowed_file(text: str) -> Path | None:
    """The path in `text` if it is below an allowed folder, links followed."""
    name = text.removeprefix("file://")
    if not FOLDERS or len(text) > 4096 or "\0" in text or not Path(name).is_absolute():
        return None
    path = Path(os.path.realpath(name))
    return path if any(path.is_relative_to(folder) for folder in FOLDERS) else None


def _shown(value: Any) -> str:
    """A short form for messages, without the query of a URL, which may contain a signature."""
    if not isinstance(value, str):
        return f"{len(value)} bytes"
    text = value.partition("?")[0]
    return repr(text if len(text) <= 80 else f"{text[:60]}... ({len(value)} characters)")


set_model(DetectorModel())
