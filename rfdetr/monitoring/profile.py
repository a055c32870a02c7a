"""What a detector sees in a set of images, small enough to be kept beside its weights.

The profile of the dataset that a model was trained with is the reference; `rfdetr.monitoring.drift`
compares the profile of recent images with it.
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

from rfdetr.data.image_input import height_and_width, read_image
from rfdetr.data.transforms import MEAN, STD, preprocess
from rfdetr.errors import InputError
from rfdetr.files import atomic_path

if TYPE_CHECKING:
    from rfdetr.data.image_input import ImageLike
    from rfdetr.detector import RFDETR
    from rfdetr.model.network import RFDETRNetwork

log = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 1
IMAGES = 512  # of a profile
EMBEDDINGS = 256  # kept of them
BATCH_SIZE = 8
THRESHOLD = 0.3  # score from which a detection counts as a box
SCORE_FLOOR = 0.05  # score from which a detection is kept
PER_IMAGE = 40  # detections that are kept
LUMA = (0.299, 0.587, 0.114)
STEPS_PER_OCTAVE = 4  # of image sizes and shapes


@dataclass(frozen=True)
class Profile:
    """Facts of n images as the detector saw them.

    `features` hold one number per image: brightness, contrast and sharpness of the resized picture
    in 0..1, image_size and image_shape as log2 of the side (root of width x height) and of width /
    height, best_score, and boxes_per_image with a score of at least `threshold`. Detection k
    belongs to image `owner[k]`; its size is the root of its share of the image's area.
    `embeddings` (at most 256, D) are means of the last feature map, of the images `embedded(n)`.
    `held_out` is False for images that the model was fitted to: their scores are better than those
    of images that it sees for the first time.
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

    def __len__(self) -> int:
        return len(self.files)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .npz file, well below a megabyte."""
        facts = {
            "format": FORMAT,
            "files": self.files,
            "class_names": self.class_names,
            "threshold": self.threshold,
            "unreadable": self.unreadable,
        }
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"feature.{name}": values for name, values in self.features.items()}
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            np.savez_compressed(stream, facts=np.array(json.dumps(facts)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
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
            raise InputError(f"{path} is no profile of images: {error}.") from error
        if not known:
            raise InputError(f"{path} is a profile of another version; register the model again.")
        fields: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in facts.items()
        }
        return cls(features=features, **fields, **arrays)


_ARRAYS = ("owner", "scores", "sizes", "labels", "embeddings", "held_out")


def embedded(images: int) -> NDArray[np.int64]:
    """Numbers of the images whose embedding a profile of `images` images keeps."""
    return evenly(np.arange(images), EMBEDDINGS)


def evenly(items: NDArray[T], limit: int) -> NDArray[T]:  # type: ignore[type-var]
    """At most `limit` items, evenly spread."""
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
) -> Profile:
    """The profile of at most `limit` evenly spread `files`; `fitted` are those trained on.

    Files that are no images are named in `unreadable` and passed over. Raises InputError when none
    is left.
    """
    chosen = [Path(files[i]) for i in evenly(np.arange(len(files)), limit)]
    seen = _Seen({Path(file) for file in fitted})
    network = detector.model.model.eval()
    with torch.inference_mode(), _last_maps(network) as maps:
        for start in range(0, len(chosen), batch_size):
            pictures = list(_readable(chosen[start : start + batch_size], seen))
            if pictures:
                _look(detector, pictures, seen)
                seen.embeddings.append(maps.pop().float().mean(dim=(2, 3)).cpu())
    if not seen.files:
        raise InputError(f"None of {len(chosen)} files is an image that can be read.")
    return _finish(seen, tuple(detector.class_names), threshold)


class _Seen:
    """What has been gathered so far, one entry per image or per batch."""

    def __init__(self, fitted: set[Path]) -> None:
        self.fitted = fitted
        self.files: list[str] = []
        self.held_out: list[bool] = []
        self.unreadable: list[str] = []
        self.pixels: list[Tensor] = []
        self.geometry: list[tuple[float, float]] = []
        self.found: list[dict[str, NDArray[Any]]] = []
        self.embeddings: list[Tensor] = []


def _readable(files: Sequence[Path], seen: _Seen) -> Iterator[ImageLike]:
    for file in files:
        try:
            picture = read_image(file)
        except (InputError, OSError) as error:
            log.warning("%s is passed over: %s", file, error)
            seen.unreadable.append(file.name)
        else:
            seen.files.append(file.name)
            seen.held_out.append(file not in seen.fitted)
            yield picture


@contextmanager
def _last_maps(network: RFDETRNetwork) -> Iterator[list[Tensor]]:
    """The encoder's last feature map (B, D, h, w) of each pass, as long as the block runs."""
    maps: list[Tensor] = []
    handle = network.encoder.register_forward_hook(lambda _m, _i, levels: maps.append(levels[-1]))
    try:
        yield maps
    finally:
        handle.remove()


def _look(detector: RFDETR, pictures: Sequence[ImageLike], seen: _Seen) -> None:
    holder = detector.model
    inputs = torch.stack([preprocess(picture, holder.resolution) for picture in pictures])
    outputs = holder.model(inputs.to(holder.device))
    outputs.pop("pred_masks", None)
    unit = torch.ones(len(pictures), 2, device=holder.device)  # boxes as shares of the sides
    for result in holder.postprocess(outputs, unit):
        count = min(PER_IMAGE, int((result["scores"] >= SCORE_FLOOR).sum()))
        best = result["scores"][:1].cpu().numpy()
        kept = {name: value[:count].cpu().numpy() for name, value in result.items()}
        seen.found.append({**kept, "best": best})
    seen.pixels.append(_pixel_features(inputs))
    for picture in pictures:
        height, width = height_and_width(picture)
        seen.geometry.append((math.log2(math.sqrt(width * height)), math.log2(width / height)))


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


def _finish(seen: _Seen, class_names: tuple[str, ...], threshold: float) -> Profile:
    brightness, contrast, sharpness = torch.cat(seen.pixels).T.numpy()
    geometry = np.round(np.array(seen.geometry) * STEPS_PER_OCTAVE) / STEPS_PER_OCTAVE
    counts = [int((found["scores"] >= threshold).sum()) for found in seen.found]
    boxes = np.concatenate([found["boxes"] for found in seen.found])
    features = {
        "brightness": brightness,
        "contrast": contrast,
        "sharpness": sharpness,
        "image_size": geometry[:, 0],
        "image_shape": geometry[:, 1],
        "best_score": np.array([found["best"].max(initial=0) for found in seen.found]),
        "boxes_per_image": np.array(counts),
    }
    kept = [len(found["scores"]) for found in seen.found]
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(min=0)
    embeddings = torch.cat(seen.embeddings).numpy()[embedded(len(seen.files))]
    return Profile(
        files=tuple(seen.files),
        features={name: values.astype(np.float32) for name, values in features.items()},
        owner=np.repeat(np.arange(len(kept), dtype=np.int32), kept),
        scores=np.concatenate([f["scores"] for f in seen.found]).astype(np.float16),
        sizes=np.sqrt(sides.prod(axis=1)).astype(np.float16),
        labels=np.concatenate([f["labels"] for f in seen.found]).astype(np.int32),
        embeddings=embeddings.astype(np.float16),
        held_out=np.array(seen.held_out),
        class_names=class_names,
        threshold=threshold,
        unreadable=tuple(seen.unreadable),
    )
