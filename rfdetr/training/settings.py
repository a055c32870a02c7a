"""What the two configurations say together: ignored settings, and the record of both."""

from __future__ import annotations

import warnings
from typing import Any

from rfdetr.config import ModelConfig, TrainConfig

# fields of TrainConfig that repeat the model's settings; the model's value acts
REPEATED = ("group_detr", "ia_bce_loss", "num_select", "segmentation_head")


def warn_ignored_settings(model_config: ModelConfig, train_config: TrainConfig) -> None:
    """One UserWarning for settings given in `train_config` that differ from the model's."""
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
