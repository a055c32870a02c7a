"""Makes the profile of a set of images: one pass of the network over them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rfdetr.data.decode import Levels
from rfdetr.data.image_input import ImageLike, height_and_width, read_image
from rfdetr.data.transforms import MEAN, STD, preprocess
from rfdetr.errors import InputError
from rfdetr.evaluation.operating_point import OperatingPoint
from rfdetr.monitoring.image_profile import (
    IMAGES,
    THRESHOLD,
    ImageProfile,
    counts_as_box,
    embedded_images,
    evenly,
)

if TYPE_CHECKING:
    from rfdetr.detector import RFDETR
    from rfdetr.model.network import RFDETRNetwork

log = logging.getLogger(__name__)

BATCH_SIZE = 8
SCORE_FLOOR = 0.05  # score from which a detection is kept
PER_IMAGE = 40  # detections that are kept of an image
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
STEPS_PER_OCTAVE = 4  # of image sizes and shapes


def profile_images(
    detector: RFDETR,
    files: Sequence[str | os.PathLike[str]],
    *,
    fitted: Collection[str | os.PathLike[str]] = (),
    batch_size: int = BATCH_SIZE,
    limit: int = IMAGES,
    threshold: float = THRESHOLD,
    point: OperatingPoint | None = None,
) -> ImageProfile:
    """The profile of at most `limit` evenly spaced `files`; `fitted` are training images.

    Boxes are counted above the operating point, or without one from `threshold` on.
    Files that cannot be read are listed in `unreadable` and skipped. Raises InputError if none can
    be read.
    """
    chosen = [Path(files[i]) for i in evenly(np.arange(len(files)), limit)]
    collected = _Collected({Path(file) for file in fitted})
    network = detector.model.model.eval()
    levels = detector.model_config.grey_levels
    with torch.inference_mode(), _last_maps(network) as maps:
        for start in range(0, len(chosen), batch_size):
            images = list(_readable(chosen[start : start + batch_size], collected, levels))
            if images:
                _detect(detector, images, collected)
                collected.embeddings.append(maps.pop().float().mean(dim=(2, 3)).cpu())
    if not collected.files:
        raise InputError(f"None of the {len(chosen)} files is a readable image.")
    return _profile(collected, tuple(detector.class_names), threshold, point)


class _Collected:
    """Values collected so far, one entry per image or per batch."""

    def __init__(self, fitted: set[Path]) -> None:
        self.fitted = fitted
        self.files: list[str] = []
        self.held_out: list[bool] = []
        self.unreadable: list[str] = []
        self.pixels: list[Tensor] = []
        self.geometry: list[tuple[float, float]] = []
        self.found: list[dict[str, NDArray[Any]]] = []
        self.embeddings: list[Tensor] = []


def _readable(
    files: Sequence[Path], collected: _Collected, levels: Levels | None
) -> Iterator[ImageLike]:
    for file in files:
        try:
            image = read_image(file, levels)
        except (InputError, OSError) as error:
            log.warning("Image skipped: %s", error)
            collected.unreadable.append(file.name)
        else:
            collected.files.append(file.name)
            collected.held_out.append(file not in collected.fitted)
            yield image


@contextmanager
def _last_maps(network: RFDETRNetwork) -> Iterator[list[Tensor]]:
    """A list that receives the encoder's last feature map (B, D, h, w) of each forward pass."""
    maps: list[Tensor] = []
    handle = network.encoder.register_forward_hook(lambda _m, _i, levels: maps.append(levels[-1]))
    try:
        yield maps
    finally:
        handle.remove()


def _detect(detector: RFDETR, images: Sequence[ImageLike], collected: _Collected) -> None:
    state = detector.model
    inputs = torch.stack([preprocess(image, state.resolution) for image in images])
    outputs = state.model(inputs.to(state.device))
    outputs.pop("pred_masks", None)
    unit = torch.ones(len(images), 2, device=state.device)  # boxes as fractions of the image
    for result in state.postprocess(outputs, unit):
        count = min(PER_IMAGE, int((result["scores"] >= SCORE_FLOOR).sum()))
        best = result["scores"][:1].cpu().numpy()
        kept = {name: value[:count].cpu().numpy() for name, value in result.items()}
        collected.found.append({**kept, "best": best})
    collected.pixels.append(_pixel_features(inputs))
    for image in images:
        height, width = height_and_width(image)
        collected.geometry.append((math.log2(math.sqrt(width * height)), math.log2(width / height)))


def _pixel_features(inputs: Tensor) -> Tensor:
    """Brightness, contrast, sharpness (B, 3) of normalised images (B, 3, H, W).

    Sharpness is the mean absolute second difference along both sides.
    """
    weights = torch.tensor(LUMA) * torch.tensor(STD)
    black = float((torch.tensor(LUMA) * torch.tensor(MEAN)).sum())
    luma = torch.einsum("bchw,c->bhw", inputs, weights) + black
    along, down = luma.diff(n=2, dim=2).abs(), luma.diff(n=2, dim=1).abs()
    sharpness = along.mean(dim=(1, 2)) + down.mean(dim=(1, 2))
    return torch.stack([luma.mean(dim=(1, 2)), luma.std(dim=(1, 2)), sharpness], dim=1)


def _profile(
    collected: _Collected,
    class_names: tuple[str, ...],
    threshold: float,
    point: OperatingPoint | None,
) -> ImageProfile:
    brightness, contrast, sharpness = torch.cat(collected.pixels).T.numpy()
    geometry = np.round(np.array(collected.geometry) * STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE
    counts = [
        int(counts_as_box(found["labels"], found["scores"], threshold, point).sum())
        for found in collected.found
    ]
    boxes = np.concatenate([found["boxes"] for found in collected.found])
    features = {
        "brightness": brightness,
        "contrast": contrast,
        "sharpness": sharpness,
        "image_size": geometry[:, 0],
        "image_shape": geometry[:, 1],
        "best_score": np.array([found["best"].max(initial=0) for found in collected.found]),
        "boxes_per_image": np.array(counts),
    }
    kept = [len(found["scores"]) for found in collected.found]
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(min=0)
    embeddings = torch.cat(collected.embeddings).numpy()[embedded_images(len(collected.files))]
    return ImageProfile(
        files=tuple(collected.files),
        features={name: values.astype(np.float32) for name, values in features.items()},
        owner=np.repeat(np.arange(len(kept), dtype=np.int32), kept),
        scores=np.concatenate([f["scores"] for f in collected.found]).astype(np.float16),
        sizes=np.sqrt(sides.prod(axis=1)).astype(np.float16),
        labels=np.concatenate([f["labels"] for f in collected.found]).astype(np.int32),
        embeddings=embeddings.astype(np.float16),
        held_out=np.array(collected.held_out),
        class_names=class_names,
        threshold=threshold,
        unreadable=tuple(collected.unreadable),
        point=point,
    )
