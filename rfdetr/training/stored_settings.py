"""The two configurations together: ignored settings, and how checkpoints store both."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from rfdetr.checkpoints.record import CheckpointRecord
from rfdetr.checkpoints.structure import infer_config
from rfdetr.config import MODEL_CONFIGS, ModelConfig, SegmentationTrainConfig, TrainConfig
from rfdetr.errors import CheckpointError, ConfigError

# fields of TrainConfig that repeat the model's settings; the model's value is used
REPEATED = ("group_detr", "ia_bce_loss", "num_select", "segmentation_head")


def warn_ignored_settings(model_config: ModelConfig, train_config: TrainConfig) -> None:
    """One UserWarning for settings of `train_config` that differ from the model's."""
    ignored = [
        f"{name}={getattr(train_config, name)} (the model has {getattr(model_config, name)})"
        for name in REPEATED
        if name in train_config.model_fields_set
        and getattr(train_config, name) != getattr(model_config, name)
    ]
    if ignored:
        warnings.warn(
            f"Ignored in {type(train_config).__name__}: {', '.join(ignored)}. Set them in the "
            "model configuration.",
            UserWarning,
            stacklevel=3,
        )


def hyper_parameters(model_config: ModelConfig, train_config: TrainConfig) -> dict[str, Any]:
    """Both configurations as plain values, for loggers and checkpoints."""
    return {
        "model_name": type(model_config).__name__,
        "model_config": model_config.model_dump(mode="json"),
        "train_config": train_config.model_dump(mode="json"),
    }


def stored_model_config(value: ModelConfig | dict[str, Any], class_name: str) -> ModelConfig:
    """The configuration that `hyper_parameters` recorded, without pretrained weights.

    A configuration is returned as it is. Raises ConfigError for a dictionary of an unknown class.
    """
    if isinstance(value, ModelConfig):
        return value
    classes = {cls.__name__: cls for cls in MODEL_CONFIGS.values()}
    if class_name not in classes:
        raise ConfigError(
            f"model_name {class_name!r} is not a configuration class; known: "
            f"{', '.join(classes)}. Or pass model_config and train_config as configurations."
        )
    return classes[class_name](**{**value, "pretrain_weights": None})


def stored_train_config(value: TrainConfig | dict[str, Any]) -> TrainConfig:
    """As `stored_model_config`; the segmentation fields determine the class."""
    if isinstance(value, TrainConfig):
        return value
    segmentation = value.keys() - TrainConfig.model_fields.keys()
    config_class = SegmentationTrainConfig if segmentation else TrainConfig
    return config_class(**{name: v for name, v in value.items() if name not in REPEATED})


def recorded_model_config(record: CheckpointRecord) -> ModelConfig:
    """The configuration of the network in a `.pth` file, with the file as its weights."""
    config = infer_config(record, pretrain_weights=record.path)
    config.infer_num_classes(config.num_classes)
    return config


def recorded_train_config(record: CheckpointRecord) -> TrainConfig:
    """The training settings of a `.pth` file; CheckpointError if it does not record them."""
    known = SegmentationTrainConfig.model_fields
    try:
        return stored_train_config({n: v for n, v in record.args.items() if n in known})
    except ValueError as error:
        raise CheckpointError(
            f"{record.path} does not record the settings of its training: pass "
            "train_config=TrainConfig(dataset_dir=...)."
        ) from error


def names_of_loader(loaders: Any) -> Any:
    """The class names of the dataset behind a loader (the first of several), or None."""
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
    dataset = getattr(loader, "dataset", None)
    while dataset is not None:
        names = getattr(dataset, "class_names", None)
        if names is not None:
            return names
        dataset = getattr(dataset, "dataset", None)  # a Subset or another wrapper
    return None
