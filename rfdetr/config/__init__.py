"""Configuration of models and of training runs. Importing this package does not import torch.

Unknown fields are refused with the nearest known name, so that a typo never trains silently.
"""

from typing import Any

from rfdetr.compat import absent
from rfdetr.config.model import ENCODER_SIZES, STRUCTURE_FIELDS, Encoder, ModelConfig
from rfdetr.config.strict import Positive, StrictConfig, device_text, optional_fields
from rfdetr.config.training import (
    Hyperparameters,
    SegmentationTrainConfig,
    TrainConfig,
    Workers,
)
from rfdetr.config.variants import (
    MODEL_CONFIGS,
    RFDETRBaseConfig,
    RFDETRLargeConfig,
    RFDETRLargeDeprecatedConfig,
    RFDETRMediumConfig,
    RFDETRNanoConfig,
    RFDETRSeg2XLargeConfig,
    RFDETRSegLargeConfig,
    RFDETRSegMediumConfig,
    RFDETRSegNanoConfig,
    RFDETRSegPreviewConfig,
    RFDETRSegSmallConfig,
    RFDETRSegXLargeConfig,
    RFDETRSmallConfig,
)

__all__ = [
    "ENCODER_SIZES",
    "MODEL_CONFIGS",
    "STRUCTURE_FIELDS",
    "Encoder",
    "Hyperparameters",
    "ModelConfig",
    "Positive",
    "RFDETRBaseConfig",
    "RFDETRLargeConfig",
    "RFDETRLargeDeprecatedConfig",
    "RFDETRMediumConfig",
    "RFDETRNanoConfig",
    "RFDETRSeg2XLargeConfig",
    "RFDETRSegLargeConfig",
    "RFDETRSegMediumConfig",
    "RFDETRSegNanoConfig",
    "RFDETRSegPreviewConfig",
    "RFDETRSegSmallConfig",
    "RFDETRSegXLargeConfig",
    "RFDETRSmallConfig",
    "SegmentationTrainConfig",
    "StrictConfig",
    "TrainConfig",
    "Workers",
    "device_text",
    "optional_fields",
]


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
