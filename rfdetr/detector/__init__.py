"""The detector as one object: train, evaluate, predict, export. One class per size."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, ClassVar

from rfdetr import config as configs
from rfdetr.checkpoints.download import resolve_weights
from rfdetr.checkpoints.pretrained import LoadReport, initialise_weights, load_record
from rfdetr.checkpoints.record import CheckpointRecord, read_checkpoint
from rfdetr.checkpoints.safe_io import StrPath
from rfdetr.checkpoints.structure import infer_config, infer_config_class
from rfdetr.config import MODEL_CONFIGS, ModelConfig
from rfdetr.detector.predict import Prediction
from rfdetr.detector.state import DetectorState, Origin, torch_device
from rfdetr.detector.train import Training
from rfdetr.errors import CheckpointError, ConfigError
from rfdetr.model.network import RFDETRNetwork, build_network

SHOWN_NAMES = 5


class RFDETR(Training, Prediction):
    """A detector of one size. Keywords are the fields of its configuration class.

    Raises ValueError for an unknown keyword, CheckpointError or DownloadError for weights that
    cannot be used. Use a sized class (`RFDETRNano`, ...) or `RFDETR.from_checkpoint`.
    """

    config_class: ClassVar[type[ModelConfig]] = ModelConfig

    def __init__(self, **settings: Any) -> None:
        if self.config_class is ModelConfig:
            raise ConfigError(
                "RFDETR has no size: use RFDETRNano or another size, or RFDETR.from_checkpoint."
            )
        _ignore_trust(settings)
        config = self.config_class(**settings)
        network = build_network(config)
        self._begin(network, config, initialise_weights(network, config))

    def _begin(
        self, network: RFDETRNetwork, config: ModelConfig, report: LoadReport | None
    ) -> None:
        self.model_config = config
        self.model = DetectorState(network.to(torch_device(config.device)).eval(), config)
        if report is not None and report.class_names:
            self.model.class_names = list(report.class_names)
            self.model.label_offset = report.label_offset
        if report is not None:
            self.model.square = report.square
            in_file = max(1, report.num_classes or 0)
            resized = report.num_classes is not None and in_file != config.num_classes
            encoder_only = "" if report.num_classes is not None else " (encoder only)"
            self.model.origin = Origin(
                f"{report.path}{encoder_only}",
                report.averaged,
                report.weights_epoch,
                file_classes=in_file if resized else None,
            )

    @classmethod
    def from_checkpoint(cls, path: StrPath, **overrides: Any) -> RFDETR:
        """The detector in a checkpoint of any generation, with its classes.

        On `RFDETR` the size follows the file; on a sized class the file must match it. `overrides`
        are configuration fields, for example device or num_classes. Raises CheckpointError,
        FileNotFoundError or ValueError.
        """
        _ignore_trust(overrides)
        file = resolve_weights(path)
        record = read_checkpoint(file, mmap=True)
        sized = cls if cls is not RFDETR else DETECTOR_CLASSES[infer_config_class(record)]
        _check_size(record, sized)
        settings = {"pretrain_weights": os.fspath(file), **overrides}
        config = infer_config(record, sized.config_class, **settings)
        if "num_classes" not in overrides:
            config.infer_num_classes(config.num_classes)
        detector = sized.__new__(sized)
        network = build_network(config)
        detector._begin(network, config, load_record(network, config, record))
        detector.model.weights = Path(file)
        return detector

    @property
    def class_names(self) -> list[str]:
        """Names of the classes: of the data or the weights, else COCO's 80, else numbers."""
        return self.model.names()

    def __repr__(self) -> str:
        names = self.class_names
        shown = ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
        optimized = "" if self.model.optimized is None else ", optimized copy"
        return (
            f"{type(self).__name__}({self.model_config.num_classes} classes: {shown}; "
            f"{self.model.origin}; {self.model.resolution} pixels, {self.model.device}{optimized})"
        )


def _check_size(record: CheckpointRecord, sized: type[RFDETR]) -> None:
    """CheckpointError for a file that records another size."""
    own = f"{record.model_name}".removesuffix("Config")
    known = {cls.__name__.removesuffix("Config") for cls in MODEL_CONFIGS.values()}
    expected = sized.config_class.__name__.removesuffix("Config")
    if own in known and own != expected:
        raise CheckpointError(
            f"{record.path} is a checkpoint of {own}, not of {expected}. Load it with "
            f"{own}.from_checkpoint, or with RFDETR.from_checkpoint for any size."
        )


def _ignore_trust(settings: dict[str, Any]) -> None:
    if settings.pop("trust_checkpoint", None) is not None:
        warnings.warn(
            "trust_checkpoint is ignored: checkpoints are data here, and loading one never runs "
            "code from it.",
            UserWarning,
            stacklevel=3,
        )


class RFDETRNano(RFDETR):
    """Detection, 384 pixels."""

    config_class = configs.RFDETRNanoConfig


class RFDETRSmall(RFDETR):
    """Detection, 512 pixels."""

    config_class = configs.RFDETRSmallConfig


class RFDETRMedium(RFDETR):
    """Detection, 576 pixels."""

    config_class = configs.RFDETRMediumConfig


class RFDETRBase(RFDETR):
    """Detection, 560 pixels, patch 14."""

    config_class = configs.RFDETRBaseConfig


class RFDETRLarge(RFDETR):
    """Detection, 704 pixels."""

    config_class = configs.RFDETRLargeConfig


class RFDETRLargeDeprecated(RFDETR):
    """Detection, 560 pixels, the first large model."""

    config_class = configs.RFDETRLargeDeprecatedConfig


class RFDETRSegPreview(RFDETR):
    """Segmentation, 432 pixels, the preview."""

    config_class = configs.RFDETRSegPreviewConfig


class RFDETRSegNano(RFDETR):
    """Segmentation, 312 pixels."""

    config_class = configs.RFDETRSegNanoConfig


class RFDETRSegSmall(RFDETR):
    """Segmentation, 384 pixels."""

    config_class = configs.RFDETRSegSmallConfig


class RFDETRSegMedium(RFDETR):
    """Segmentation, 432 pixels."""

    config_class = configs.RFDETRSegMediumConfig


class RFDETRSegLarge(RFDETR):
    """Segmentation, 504 pixels."""

    config_class = configs.RFDETRSegLargeConfig


class RFDETRSegXLarge(RFDETR):
    """Segmentation, 624 pixels."""

    config_class = configs.RFDETRSegXLargeConfig


class RFDETRSeg2XLarge(RFDETR):
    """Segmentation, 768 pixels."""

    config_class = configs.RFDETRSeg2XLargeConfig


from_checkpoint = RFDETR.from_checkpoint

DETECTOR_CLASSES: dict[type[ModelConfig], type[RFDETR]] = {
    cls.config_class: cls for cls in RFDETR.__subclasses__()
}
