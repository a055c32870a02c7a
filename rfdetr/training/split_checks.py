"""What a split must have before it is trained on or evaluated."""

from __future__ import annotations

import warnings
from pathlib import Path

from rfdetr.config import ModelConfig, TrainConfig
from rfdetr.data.dataset import DetectionDataset
from rfdetr.data.index import AnnotationIndex
from rfdetr.errors import ConfigError, DatasetError


def check_objects(root: Path, name: str, index: AnnotationIndex, model: ModelConfig) -> None:
    """Refuse to train on nothing, and masks without segmentations; warn about some without."""
    if name == "train" and not index.ledger.objects:
        raise DatasetError(
            f"{root}: the 'train' split has {index.ledger.without_objects()}. "
            "`python -m rfdetr.checks` lists the reasons."
        )
    if index.masked is None or index.masked.all():
        return
    boxes = int((~index.masked & ~index.crowd).sum())
    if name == "train" and not index.masked.any():
        raise DatasetError(
            f"{root}: no annotation of the 'train' split has a segmentation, which "
            f"{type(model).__name__} needs. Train a detection model, or export polygons or masks."
        )
    if boxes:
        warnings.warn(
            f"{root}: {boxes:,} object(s) of the {name!r} split have no segmentation; their "
            "boxes are used as masks.",
            stacklevel=6,
        )


def check_names(dataset: DetectionDataset, train_config: TrainConfig) -> None:
    """ConfigError unless `class_names` has a different name for each class of the dataset."""
    given, found = train_config.class_names, dataset.class_names
    if given and len(given) != len(found):
        raise ConfigError(
            f"class_names has {len(given)} names, {dataset.index.root} has {len(found)} "
            f"classes ({', '.join(found)}). Give one name per class, in this order, or omit "
            "class_names."
        )
    if given and given != found and len(set(given)) < len(given):
        repeated = ", ".join(sorted({name for name in given if given.count(name) > 1}))
        raise ConfigError(
            f"class_names repeats {repeated}: give every class a name of its own. To train two "
            "classes as one, merge them in the dataset."
        )


def check_classes(dataset: DetectionDataset, model: ModelConfig) -> None:
    """DatasetError if the dataset has more classes than the model."""
    if dataset.num_classes > model.num_classes:
        names = ", ".join(dataset.class_names[:10])
        raise DatasetError(
            f"{dataset.index.root}: the dataset has {dataset.num_classes} classes ({names}), "
            f"the model {model.num_classes}. Set num_classes={dataset.num_classes} in the model "
            "configuration."
        )
