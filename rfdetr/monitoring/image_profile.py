"""A summary of a set of images as a detector sees them, small enough to store with its weights.

The profile of the training dataset is the reference; `rfdetr.monitoring.drift` compares the
profile of recent images with it.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rfdetr.arrays import Bools, Integers
from rfdetr.data.decode import Levels
from rfdetr.data.image_input import ImageLike, height_and_width, read_image
from rfdetr.data.transforms import MEAN, STD, preprocess
from rfdetr.errors import InputError
from rfdetr.evaluation.operating_point import OperatingPoint
from rfdetr.files import atomic_path

if TYPE_CHECKING:
    from rfdetr.detector import RFDETR
    from rfdetr.model.network import RFDETRNetwork

log = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 1
IMAGES = 512  # of a profile, at most
EMBEDDINGS = 256  # of a profile, at most
BATCH_SIZE = 8
THRESHOLD = 0.3  # score from which a detection counts as a box
SCORE_FLOOR = 0.05  # score from which a detection is kept
PER_IMAGE = 40  # detections that are kept of an image
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
STEPS_PER_OCTAVE = 4  # of image sizes and shapes


@dataclass(frozen=True)
class ImageProfile:
    """Features and detections of n images.

    `features` have one number per image: brightness, contrast and sharpness of the resized image
    in 0..1; image_size, log2 of sqrt(width x height) in pixels; image_shape, log2 of width /
    height; best_score; and boxes_per_image, the detections that count: those above the operating
    point `point`, or without one those with a score of at least `threshold`.
    Detection k belongs to image `owner[k]`; `sizes[k]` is the square root of its share of the
    image's area. `embeddings` (at most 256, D) are means of the last feature map for the images
    `embedded_images(n)`. `held_out` is False for images that the model was trained on, whose
    scores are better than those of new images.
    """

    files: tuple[str, ...]
    features: Mapping[str, NDArray[np.float32]]
    owner: NDArray[np.int32]
    scores: NDArray[np.float16]
    sizes: NDArray[np.float16]
    labels: NDArray[np.int32]
    embeddings: NDArray[np.float16]
    held_out: NDArray[np.bool_]
    class_names: tuple[str, ...]
    threshold: float = THRESHOLD
    unreadable: tuple[str, ...] = ()
    point: OperatingPoint | None = None

    @property
    def counted(self) -> Bools:
        """Which of the kept detections count as boxes."""
        return counts_as_box(self.labels.astype(np.int64), self.scores, self.threshold, self.point)

    def __len__(self) -> int:
        return len(self.files)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .npz file, less than a megabyte."""
        facts = {
            "format": FORMAT,
            "files": self.files,
            "class_names": self.class_names,
            "threshold": self.threshold,
            "unreadable": self.unreadable,
            "point": self.point and self.point.to_dict(),
        }
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"feature.{name}": values for name, values in self.features.items()}
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, facts=np.array(json.dumps(facts)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ImageProfile:
        """Read what `save` wrote. Raises InputError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                facts = json.loads(str(stored["facts"]))
                known = facts.pop("format") == FORMAT
                arrays = {name: stored[name] for name in _ARRAYS}
                features = {
                    name.removeprefix("feature."): stored[name]
                    for name in stored.files
                    if name.startswith("feature.")
                }
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise InputError(f"{path} is not an image profile: {error}.") from error
        if not known:
            raise InputError(
                f"{path} has another version of the profile format; register the model again."
            )
        point = facts.pop("point", None)
        facts["point"] = point and OperatingPoint.from_dict(point)
        fields: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()
        }
        return cls(features=features, **fields, **arrays)


_ARRAYS = ("owner", "scores", "sizes", "labels", "embeddings", "held_out")


def embedded_images(images: int) -> Integers:
    """Numbers of the images whose embeddings a profile of `images` images keeps."""
    return evenly(np.arange(images), EMBEDDINGS)


def evenly(items: NDArray[T], limit: int) -> NDArray[T]:  # type: ignore[type-var]
    """At most `limit` items, evenly spaced."""
    count = min(len(items), limit)
    return items[np.linspace(0, max(0, len(items) - 1), count).round().astype(np.int64)]


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


def counts_as_box(
    labels: Integers, scores: NDArray[Any], threshold: float, point: OperatingPoint | None
) -> Bools:
    """Which detections (n,) are above the operating point, or without one reach `threshold`."""
    reached: Bools = scores >= threshold
    return reached if point is None else point.accepts(labels, scores)


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
