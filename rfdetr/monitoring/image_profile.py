"""A summary of a set of images as a detector sees them, small enough to store with its weights.

The profile of the training dataset is the reference; `rfdetr.monitoring.drift` compares the
profile of recent images with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from rfdetr.arrays import Bools, Integers
from rfdetr.errors import InputError
from rfdetr.evaluation.operating_point import OperatingPoint
from rfdetr.files import atomic_path

T = TypeVar("T")

FORMAT = 1
IMAGES = 512  # of a profile, at most
EMBEDDINGS = 256  # of a profile, at most
THRESHOLD = 0.3  # score from which a detection counts as a box


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


def counts_as_box(
    labels: Integers, scores: NDArray[Any], threshold: float, point: OperatingPoint | None
) -> Bools:
    """Which detections (n,) are above the operating point, or without one reach `threshold`."""
    reached: Bools = scores >= threshold
    return reached if point is None else point.accepts(labels, scores)
