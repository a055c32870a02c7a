"""Types that the network, the losses and post-processing exchange.

Axes: B images, Q queries (of all groups together in training mode), K class logits
(`num_classes + 1`), C channels (`hidden_dim`). Boxes are (cx, cy, w, h) as fractions of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from torch import Tensor

SpatialShapes = Sequence[tuple[int, int]]
"""Height and width of every feature level, in the order in which the memory holds them."""


class SparseMasks(TypedDict):
    """Mask logits as factors: logits[b, q] = query_features[b, q] · spatial_features[b] + bias."""

    spatial_features: Tensor  # (B, C, h, w)
    query_features: Tensor  # (B, Q, C)
    bias: Tensor  # (1,)


Masks = Tensor | SparseMasks
"""Dense mask logits (B, Q, h, w) in eval mode, their factors in training mode."""


class LayerOutputs(TypedDict):
    """Predictions of one decoder layer or of the two-stage selection."""

    pred_logits: Tensor  # (B, Q, K)
    pred_boxes: Tensor  # (B, Q, 4)
    pred_masks: NotRequired[Masks]


class Outputs(LayerOutputs):
    """Predictions of the last layer, of the earlier layers and of the two-stage selection."""

    aux_outputs: NotRequired[list[LayerOutputs]]
    enc_outputs: NotRequired[LayerOutputs]


class ImageTarget(TypedDict):
    """What the losses read from the target of one image with n objects; other keys are ignored."""

    labels: Tensor  # (n,) int64
    boxes: Tensor  # (n, 4) cxcywh as fractions of the padded input
    masks: NotRequired[Tensor]  # (n, H, W) bool, required by segmentation models


class ImageDetections(TypedDict):
    """Detections of one image, scores in descending order."""

    scores: Tensor  # (n,) in 0..1
    labels: Tensor  # (n,) int64
    boxes: Tensor  # (n, 4) xyxy in pixels
    masks: NotRequired[Tensor]  # (n, 1, H, W) bool


class HostDetections(TypedDict):
    """Detections of one image on the CPU, whose masks are not resized yet."""

    scores: Tensor  # (n,) in 0..1
    labels: Tensor  # (n,) int64
    boxes: Tensor  # (n, 4) xyxy in pixels
    queries: NotRequired[Tensor]  # (n,) int64
    mask_logits: NotRequired[Tensor]  # (Q, h, w) on the network's device
