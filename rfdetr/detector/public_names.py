"""Methods that a detector offers under the names of the public package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from rfdetr.compat import HintedAttributes
from rfdetr.config import ModelConfig, SegmentationTrainConfig, TrainConfig
from rfdetr.data.transforms import MEAN, STD

if TYPE_CHECKING:
    from rfdetr.detector.state import DetectorState


class PublicNames(HintedAttributes):
    """Base of the parts of `RFDETR`."""

    means: ClassVar[list[float]] = list(MEAN)
    stds: ClassVar[list[float]] = list(STD)
    is_optimized_inplace: ClassVar[bool] = False  # `optimize_for_inference` makes a copy

    if TYPE_CHECKING:
        config_class: ClassVar[type[ModelConfig]]
        model: DetectorState
        model_config: ModelConfig

    @property
    def size(self) -> str:
        """The variant, for example "rfdetr-nano"."""
        return f"rfdetr-{self.config_class.variant}"

    def get_model_config(self, **settings: Any) -> ModelConfig:
        """A model configuration of this size."""
        return self.config_class(**settings)

    def get_train_config(self, **settings: Any) -> TrainConfig:
        """A training configuration for this kind of model."""
        segmentation = self.model_config.segmentation_head
        return (SegmentationTrainConfig if segmentation else TrainConfig)(**settings)
