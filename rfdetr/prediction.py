"""From images to detections: what `RFDETR.predict` runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rfdetr.config import ModelConfig
from rfdetr.data.batch import pad_images
from rfdetr.data.coco_names import COCO_CATEGORIES, COCO_CLASSES, COCO_NAMES
from rfdetr.data.image_input import ImageLike, height_and_width, read_image
from rfdetr.data.transforms import EvalTransform, preprocess
from rfdetr.export.frozen import FINAL_OUTPUTS, FrozenNetwork
from rfdetr.model.network import RFDETRNetwork
from rfdetr.model.postprocess import PostProcess

if TYPE_CHECKING:
    import supervision


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


class DetectorState:
    """Mutable state of a detector: network (`model`), post-processing and class names.

    `label_offset` is 1 if label i + 1 means `class_names[i]`. `square` is False if the weights were
    trained on images at their own aspect ratio. `optimized` is the fixed copy of the network that
    predicts instead of it, if there is one. `origin` says which weights the network has.
    """

    def __init__(self, network: RFDETRNetwork, config: ModelConfig) -> None:
        self.model = network
        self.config = config
        self.postprocess = PostProcess(config.num_select)
        self.resolution = config.resolution
        self.class_names: list[str] | None = None
        self.label_offset = 0
        self.square = True
        self.optimized: FrozenNetwork | None = None
        self.origin = Origin("random initialisation")

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

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

    def detect(self, sources: Sequence[Any], threshold: float) -> list[supervision.Detections]:
        """Detections of one batch of images of any kind that `RFDETR.predict` takes."""
        images = [read_image(source) for source in sources]
        sizes = [height_and_width(image) for image in images]
        network = self.model if self.optimized is None else self.optimized
        outputs = network(self._batch(images, sizes))
        found = []
        for i, size in enumerate(sizes):  # one at a time: masks have the size of the image
            own = {name: outputs[name][i : i + 1] for name in FINAL_OUTPUTS if name in outputs}
            target = torch.tensor([size], device=self.device)
            (result,) = self.postprocess(own, target, threshold)
            found.append(self._detections(result))
        return found

    def _batch(self, images: Sequence[ImageLike], sizes: Sequence[tuple[int, int]]) -> Any:
        """The batch as validation builds it: a tensor of squares, or padded with a mask."""
        square = self.square or self.optimized is not None
        transform = EvalTransform(self.resolution, square=square)
        views = [transform.view(height, width) for height, width in sizes]
        tensors = [
            preprocess(image, (view.out_height, view.out_width))
            for image, view in zip(images, views, strict=True)
        ]
        if square:
            return torch.stack(tensors).to(self.device)
        return pad_images(tensors, self.config.block_size).to(self.device)

    def _detections(self, result: dict[str, Tensor]) -> supervision.Detections:
        import numpy as np
        import supervision

        arrays = {name: value.cpu().numpy() for name, value in result.items()}
        known = self.label_names()
        names = [known.get(label, str(label)) for label in arrays["labels"].tolist()]
        return supervision.Detections(
            xyxy=arrays["boxes"],
            confidence=arrays["scores"],
            class_id=arrays["labels"].astype(int),
            mask=arrays["masks"][:, 0] if "masks" in arrays else None,
            data={"class_name": np.array(names, dtype=str)},
        )


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
