"""What a detector holds, and from images to detections: what `RFDETR.predict` runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rfdetr.checkpoints.legacy_names import from_legacy
from rfdetr.compat import HintedAttributes
from rfdetr.config import ModelConfig
from rfdetr.data.batch import normalise, pad_images
from rfdetr.data.coco_names import COCO_CATEGORIES, COCO_CLASSES, COCO_NAMES
from rfdetr.data.decode import Pixels
from rfdetr.data.transforms import EvalTransform
from rfdetr.data.upload import resized
from rfdetr.errors import ConfigError, InputError
from rfdetr.evaluation.operating_point import OperatingPoint, read_point
from rfdetr.export.frozen import FrozenNetwork
from rfdetr.model.network import RFDETRNetwork
from rfdetr.model.postprocess import PostProcess, image_masks
from rfdetr.model.types import HostDetections

if TYPE_CHECKING:
    import supervision

AT_POINT = "operating_point"


@dataclass(frozen=True)
class Origin:
    """Which weights a detector has: EMA or live (None: unknown), of which epoch, from where.

    `epoch` counts from 0. `file_classes` is the class count of the file if the class head was
    resized from it and has not been trained since.
    """

    source: str
    averaged: bool | None = None
    epoch: int | None = None
    file_classes: int | None = None

    def __str__(self) -> str:
        kind = {None: "weights", True: "EMA weights", False: "live weights"}[self.averaged]
        epoch = "" if self.epoch is None else f" of epoch {self.epoch}"
        return f"{kind}{epoch} from {self.source}"


class DetectorState(HintedAttributes):
    """Mutable state of a detector: network (`model`), post-processing and class names.

    `label_offset` is 1 if label i + 1 means `class_names[i]`. `square` is False if the weights were
    trained on images at their own aspect ratio. `optimized` is the fixed copy of the network that
    predicts instead of it, if there is one. `origin` says which weights the network has, `weights`
    is the file that they are unchanged from, `dataset_dir` the data it was trained on last.
    """

    def __init__(self, network: RFDETRNetwork, config: ModelConfig) -> None:
        self.model = network
        register: Any = network.register_load_state_dict_pre_hook
        register(_take_public_weights)
        self.config = config
        self.postprocess = PostProcess(config.num_select)
        self.resolution = config.resolution
        self.class_names: list[str] | None = None
        self.label_offset = 0
        self.square = True
        self.optimized: FrozenNetwork | None = None
        self.origin = Origin("random initialisation")
        self.dataset_dir: str | None = None
        self.weights: Path | None = None
        self._point: OperatingPoint | None = None
        self._point_of: Path | None = None

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def args(self) -> ModelConfig:
        """The configuration, under the name of the public package."""
        return self.config

    @property
    def inference_model(self) -> FrozenNetwork | None:
        """The optimized copy, under the name of the public package."""
        return self.optimized

    @property
    def has_names(self) -> bool:
        """Whether the names of the classes are known."""
        return bool(self.class_names) or self.config.num_classes == COCO_CLASSES

    @property
    def operating_point(self) -> OperatingPoint | None:
        """The operating point in the model.json beside the weights, if there is one.

        Raises InputError if model.json is damaged or describes other weights.
        """
        if self.weights != self._point_of:
            self._point = None if self.weights is None else read_point(self.weights)
            self._point_of = self.weights
        return self._point if self.weights is not None else None

    def threshold(self, given: float | str) -> float | OperatingPoint:
        """What `predict` was given, with the name "operating_point" resolved.

        Raises InputError for anything else that is not a number up to 1.
        """
        if given != AT_POINT:
            try:
                value = float("nan") if isinstance(given, str) else float(given)
            except (TypeError, ValueError):
                value = float("nan")
            if not value <= 1:  # also true for NaN
                raise InputError(
                    f"threshold must be a number up to 1 or '{AT_POINT}'; got {given!r}. Scores "
                    "are in 0..1."
                )
            return value
        if (point := self.operating_point) is None:
            raise InputError(
                f"{self.origin} have no operating point: there is none in a model.json beside the "
                "file. Give a threshold; registered models have a point if "
                "evaluate.operating_point was set."
            )
        return point

    def names(self) -> list[str]:
        """Names of the classes: of the data or the weights, else COCO's 80, else numbers."""
        if self.class_names:
            return list(self.class_names)
        if self.config.num_classes == COCO_CLASSES:
            return list(COCO_NAMES)
        return [str(label) for label in range(self.config.num_classes)]

    def label_names(self) -> dict[int, str]:
        """Label -> name of every class."""
        names = self.names()
        if self.config.num_classes == COCO_CLASSES and names == COCO_NAMES:
            return dict(COCO_CATEGORIES)
        return {index + self.label_offset: name for index, name in enumerate(names)}

    def warn_of_resized_head(self) -> None:
        """UserWarning if the class head was resized and has not been trained since."""
        found = self.origin.file_classes
        if found is not None:
            warnings.warn(
                f"{self.origin.source} has {found} classes, num_classes is "
                f"{self.config.num_classes}, and the resized class head has not been "
                "trained: objects appear under several classes or under none. Omit num_classes "
                "to predict with the file's classes, or train first.",
                UserWarning,
                stacklevel=3,
            )

    def detect(
        self,
        images: Sequence[Pixels],
        threshold: float | OperatingPoint,
        dtype: torch.dtype = torch.float32,
        shape: tuple[int, int] | None = None,
    ) -> list[supervision.Detections]:
        """Detections of one batch; the network runs under autocast unless `dtype` is float32.

        `shape` (height, width) replaces the resolution of the network.
        """
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        network = self.model if self.optimized is None else self.optimized
        half = dtype != torch.float32
        with torch.autocast(self.device.type, dtype if half else None, enabled=half):
            outputs: Any = network(self._batch(images, sizes, shape))
        point = threshold if isinstance(threshold, OperatingPoint) else None
        lowest = threshold if not isinstance(threshold, OperatingPoint) else threshold.below_lowest
        found = self.postprocess.on_host(outputs, torch.tensor(sizes), lowest)
        if point is not None:
            found = [_accepted(one, point) for one in found]
        return [self._detections(one, size) for one, size in zip(found, sizes, strict=True)]

    def _batch(
        self,
        images: Sequence[Pixels],
        sizes: Sequence[tuple[int, int]],
        shape: tuple[int, int] | None = None,
    ) -> Any:
        """The batch as validation builds it: a tensor of squares, or padded with a mask."""
        square = self.square or self.optimized is not None or shape is not None
        transform = EvalTransform(self.resolution, square=square)
        views = [transform.view(height, width) for height, width in sizes]
        inputs = [shape or (view.out_height, view.out_width) for view in views]
        pixels = resized(images, inputs, self.device)
        if square:
            return normalise(torch.stack(pixels))
        return pad_images(pixels, self.config.block_size).normalised()

    def _detections(self, result: HostDetections, size: tuple[int, int]) -> supervision.Detections:
        """Finite boxes of known classes: the head has outputs that mean no class."""
        import numpy as np
        import supervision

        known = self.label_names()
        kept = torch.tensor([n in known for n in result["labels"].tolist()], dtype=torch.bool)
        kept &= result["boxes"].isfinite().all(dim=1)
        if not kept.all():
            result = _chosen(result, kept)
        labels = result["labels"].numpy().astype(int)
        mask = None
        if "mask_logits" in result:  # one image at a time: masks have the size of the image
            mask = image_masks(result, *size)[:, 0].cpu().numpy()
        return supervision.Detections(
            xyxy=result["boxes"].numpy().copy(),  # not a view that keeps the batch
            confidence=result["scores"].numpy().copy(),
            class_id=labels,
            mask=mask,
            data={
                "class_name": np.array([known[label] for label in labels.tolist()], dtype=str),
                "source_shape": np.full((len(labels), 2), size, dtype=np.int64),
            },
        )


def _chosen(result: HostDetections, kept: Tensor) -> HostDetections:
    """Some of the detections; mask_logits are those of all queries."""
    own: Any = result
    some: Any = {name: value[kept] for name, value in own.items() if name != "mask_logits"}
    return {**result, **some}


def _accepted(result: HostDetections, point: OperatingPoint) -> HostDetections:
    """The detections above the threshold of their class."""
    kept = point.accepts(result["labels"].numpy(), result["scores"].numpy())
    return _chosen(result, torch.from_numpy(kept))


def _take_public_weights(
    network: torch.nn.Module,  # noqa: ARG001
    state: dict[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    """Let `load_state_dict` take the weights of a `.pth` file, which have other names."""
    if not prefix:
        named = from_legacy(state)
        state.clear()
        state.update(named)


def torch_device(name: Any) -> torch.device:
    """The device called `name`; "auto" is the best one of this machine.

    Raises ConfigError for a device that is unknown or that this machine does not have.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device {name!r} is unknown: use auto, cpu, cuda, cuda:1 (the second GPU) or mps."
        ) from error
    if device.type == "meta":
        raise ConfigError("device 'meta' computes nothing: use auto, cpu, cuda or mps.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        cause = str(error).partition("\n")[0].rstrip(".")
        raise ConfigError(
            f"device {name!r} cannot be used here: {cause}. Use cpu, or auto for the device "
            "that this machine has."
        ) from error
    return device


@contextmanager
def eval_mode(network: RFDETRNetwork) -> Iterator[None]:
    """Run a block with `network` in eval mode, and restore its mode."""
    training = network.training
    if training:
        network.eval()
    try:
        yield
    finally:
        if training:
            network.train()
