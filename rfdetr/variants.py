"""The detectors by size. Each takes the fields of its configuration class as keywords."""

from __future__ import annotations

from rfdetr import config
from rfdetr.detector import RFDETR


class RFDETRNano(RFDETR):
    """Detection, 384 pixels."""

    config_class = config.RFDETRNanoConfig


class RFDETRSmall(RFDETR):
    """Detection, 512 pixels."""

    config_class = config.RFDETRSmallConfig


class RFDETRMedium(RFDETR):
    """Detection, 576 pixels."""

    config_class = config.RFDETRMediumConfig


class RFDETRBase(RFDETR):
    """Detection, 560 pixels, patch 14."""

    config_class = config.RFDETRBaseConfig


class RFDETRLarge(RFDETR):
    """Detection, 704 pixels."""

    config_class = config.RFDETRLargeConfig


class RFDETRLargeDeprecated(RFDETR):
    """Detection, 560 pixels, the first large model."""

    config_class = config.RFDETRLargeDeprecatedConfig


class RFDETRSegPreview(RFDETR):
    """Segmentation, 432 pixels, the preview."""

    config_class = config.RFDETRSegPreviewConfig


class RFDETRSegNano(RFDETR):
    """Segmentation, 312 pixels."""

    config_class = config.RFDETRSegNanoConfig


class RFDETRSegSmall(RFDETR):
    """Segmentation, 384 pixels."""

    config_class = config.RFDETRSegSmallConfig


class RFDETRSegMedium(RFDETR):
    """Segmentation, 432 pixels."""

    config_class = config.RFDETRSegMediumConfig


class RFDETRSegLarge(RFDETR):
    """Segmentation, 504 pixels."""

    config_class = config.RFDETRSegLargeConfig


class RFDETRSegXLarge(RFDETR):
    """Segmentation, 624 pixels."""

    config_class = config.RFDETRSegXLargeConfig


class RFDETRSeg2XLarge(RFDETR):
    """Segmentation, 768 pixels."""

    config_class = config.RFDETRSeg2XLargeConfig


BY_CONFIG: dict[type[config.ModelConfig], type[RFDETR]] = {
    cls.config_class: cls for cls in RFDETR.__subclasses__()
}
