"""Methods that a detector offers under the names of the public package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rfdetr import compat
from rfdetr.config import ModelConfig, SegmentationTrainConfig, TrainConfig
from rfdetr.data.transforms import MEAN, STD
from rfdetr.errors import InputError

if TYPE_CHECKING:
    from rfdetr.prediction import DetectorState


class PublicNames:
    """Mixin of `RFDETR`."""

    means: ClassVar[list[float]] = list(MEAN)
    stds: ClassVar[list[float]] = list(STD)
    is_optimized_inplace: ClassVar[bool] = False  # `optimize_for_inference` makes a copy

    if TYPE_CHECKING:
        config_class: ClassVar[type[ModelConfig]]
        model: DetectorState
        model_config: ModelConfig

        def optimize_for_inference(
            self, compile: bool = True, batch_size: int = 1, dtype: torch.dtype | str = ...
        ) -> None: ...

    else:

        def __getattr__(self, name: str) -> Any:
            hint = f" {compat.NAMES[name]}" if name in compat.NAMES else ""
            kind = type(self).__name__
            raise AttributeError(f"{kind!r} object has no attribute {name!r}.{hint}")

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

    def inference(
        self,
        compile: bool = True,
        batch_size: int = 1,
        dtype: torch.dtype | str = torch.float32,
        **others: Any,
    ) -> None:
        """As `optimize_for_inference`."""
        refuse(others, compat.INFERENCE_OPTIONS, "inference()")
        self.optimize_for_inference(compile, batch_size, dtype)


def refuse(options: dict[str, Any], missing: compat.Missing, where: str) -> None:
    """Raise InputError for options that `missing` does not list or that ask for something."""
    unknown, refused = compat.drop_neutral(options, missing)
    texts = [f"{where} has no option {name!r}." for name in unknown] + refused
    if texts:
        raise InputError(" ".join(texts))
