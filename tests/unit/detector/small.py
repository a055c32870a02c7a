"""Detectors small enough for every test."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rfdetr import RFDETRNano, RFDETRSegNano
from rfdetr.detector import RFDETR

SMALL: dict[str, Any] = {
    "encoder_dim": 48, "encoder_depth": 2, "encoder_heads": 3, "out_feature_indexes": [1, 2],
    "resolution": 64, "hidden_dim": 32, "dec_layers": 1, "dim_feedforward": 64, "num_queries": 10,
    "num_select": 10, "group_detr": 1, "pretrain_weights": None, "device": "cpu",
}  # fmt: skip


def small(**settings: Any) -> RFDETR:
    return _named_only(RFDETRNano(**SMALL | settings))


def small_segmentation(**settings: Any) -> RFDETR:
    return _named_only(RFDETRSegNano(**SMALL | {"resolution": 48, "num_windows": 2} | settings))


def unnamed_outputs(detector: RFDETR) -> list[int]:
    """Outputs of the class head that mean no class."""
    outputs = len(detector.model.model.class_embed.bias)
    return [label for label in range(outputs) if label not in detector.model.label_names()]


def _named_only(detector: RFDETR) -> RFDETR:
    """As a trained head: outputs that mean no class have low scores."""
    if detector.model_config.pretrain_weights is None:
        detector.model.model.class_embed.bias.data[unnamed_outputs(detector)] = -20.0
    return detector


def pixels(height: int = 50, width: int = 70, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
