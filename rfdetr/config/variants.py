"""The configuration of every size."""

from __future__ import annotations

from typing import ClassVar

from rfdetr.config.model import BlockIndexes, DecoderWidth, Encoder, Levels, ModelConfig
from rfdetr.config.strict import PathText, Positive
from rfdetr.config.training import TrainConfig


class RFDETRNanoConfig(ModelConfig):
    """Nano: 384 pixels, patch 16, 2 decoder layers."""

    variant: ClassVar[str] = "nano"
    pretrain_weights: PathText | None = "rf-detr-nano.pth"
    encoder: Encoder = "dinov2_windowed_small"
    out_feature_indexes: BlockIndexes = [3, 6, 9, 12]
    patch_size: Positive = 16
    num_windows: Positive = 2
    resolution: Positive = 384
    projector_scale: Levels = ["P4"]
    hidden_dim: DecoderWidth = 256
    dec_layers: Positive = 2
    sa_nheads: Positive = 8
    ca_nheads: Positive = 16
    dec_n_points: Positive = 2

    @classmethod
    def hint_for(cls, name: str) -> str | None:
        if name in TrainConfig.model_fields:
            return f"{name} is a setting of the training: pass it to train() or to TrainConfig."
        return None


class RFDETRSmallConfig(RFDETRNanoConfig):
    """Small: 512 pixels, 3 decoder layers."""

    variant: ClassVar[str] = "small"
    pretrain_weights: PathText | None = "rf-detr-small.pth"
    resolution: Positive = 512
    dec_layers: Positive = 3


class RFDETRMediumConfig(RFDETRNanoConfig):
    """Medium: 576 pixels, 4 decoder layers."""

    variant: ClassVar[str] = "medium"
    pretrain_weights: PathText | None = "rf-detr-medium.pth"
    resolution: Positive = 576
    dec_layers: Positive = 4


class RFDETRBaseConfig(RFDETRNanoConfig):
    """Base: 560 pixels, patch 14, the position table of the original DINOv2 (37 x 37)."""

    variant: ClassVar[str] = "base"
    pretrain_weights: PathText | None = "rf-detr-base.pth"
    out_feature_indexes: BlockIndexes = [2, 5, 8, 11]
    patch_size: Positive = 14
    num_windows: Positive = 4
    resolution: Positive = 560
    positional_encoding_size: Positive = 37
    dec_layers: Positive = 3


class RFDETRLargeConfig(RFDETRNanoConfig):
    """Large (2026): 704 pixels, 4 decoder layers."""

    variant: ClassVar[str] = "large"
    pretrain_weights: PathText | None = "rf-detr-large-2026.pth"
    resolution: Positive = 704
    dec_layers: Positive = 4


class RFDETRLargeDeprecatedConfig(RFDETRBaseConfig):
    """The first large model: base encoder, two feature levels."""

    variant: ClassVar[str] = "large-deprecated"
    pretrain_weights: PathText | None = "rf-detr-large.pth"
    encoder: Encoder = "dinov2_windowed_base"
    projector_scale: Levels = ["P3", "P5"]
    hidden_dim: DecoderWidth = 384
    sa_nheads: Positive = 12
    ca_nheads: Positive = 24
    dec_n_points: Positive = 4


class RFDETRSegPreviewConfig(RFDETRNanoConfig):
    """Segmentation preview: 432 pixels, patch 12, 4 decoder layers, 200 queries."""

    variant: ClassVar[str] = "seg-preview"
    pretrain_weights: PathText | None = "rf-detr-seg-preview.pt"
    segmentation_head: bool = True
    patch_size: Positive = 12
    resolution: Positive = 432
    dec_layers: Positive = 4
    num_queries: Positive = 200
    num_select: Positive = 200


class RFDETRSegNanoConfig(RFDETRSegPreviewConfig):
    """Segmentation nano: 312 pixels, no windows, 100 queries."""

    variant: ClassVar[str] = "seg-nano"
    pretrain_weights: PathText | None = "rf-detr-seg-nano.pt"
    num_windows: Positive = 1
    resolution: Positive = 312
    num_queries: Positive = 100
    num_select: Positive = 100


class RFDETRSegSmallConfig(RFDETRSegPreviewConfig):
    """Segmentation small: 384 pixels, 100 queries."""

    variant: ClassVar[str] = "seg-small"
    pretrain_weights: PathText | None = "rf-detr-seg-small.pt"
    resolution: Positive = 384
    num_queries: Positive = 100
    num_select: Positive = 100


class RFDETRSegMediumConfig(RFDETRSegPreviewConfig):
    """Segmentation medium: 432 pixels, 5 decoder layers, 200 queries."""

    variant: ClassVar[str] = "seg-medium"
    pretrain_weights: PathText | None = "rf-detr-seg-medium.pt"
    dec_layers: Positive = 5


class RFDETRSegLargeConfig(RFDETRSegPreviewConfig):
    """Segmentation large: 504 pixels, 5 decoder layers, 200 queries."""

    variant: ClassVar[str] = "seg-large"
    pretrain_weights: PathText | None = "rf-detr-seg-large.pt"
    resolution: Positive = 504
    dec_layers: Positive = 5


class RFDETRSegXLargeConfig(RFDETRSegPreviewConfig):
    """Segmentation extra large: 624 pixels, 6 decoder layers, 300 queries."""

    variant: ClassVar[str] = "seg-xlarge"
    pretrain_weights: PathText | None = "rf-detr-seg-xlarge.pt"
    resolution: Positive = 624
    dec_layers: Positive = 6
    num_queries: Positive = 300
    num_select: Positive = 300


class RFDETRSeg2XLargeConfig(RFDETRSegXLargeConfig):
    """Segmentation double extra large: 768 pixels."""

    variant: ClassVar[str] = "seg-2xlarge"
    pretrain_weights: PathText | None = "rf-detr-seg-xxlarge.pt"
    resolution: Positive = 768


MODEL_CONFIGS: dict[str, type[ModelConfig]] = {
    cls.variant: cls
    for cls in (
        RFDETRNanoConfig,
        RFDETRSmallConfig,
        RFDETRMediumConfig,
        RFDETRBaseConfig,
        RFDETRLargeConfig,
        RFDETRLargeDeprecatedConfig,
        RFDETRSegPreviewConfig,
        RFDETRSegNanoConfig,
        RFDETRSegSmallConfig,
        RFDETRSegMediumConfig,
        RFDETRSegLargeConfig,
        RFDETRSegXLargeConfig,
        RFDETRSeg2XLargeConfig,
    )
}
