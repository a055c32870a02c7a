"""The callbacks of a training run. Names are imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rfdetr.lazy import lazy_names

if TYPE_CHECKING:
    from rfdetr.training.callbacks.best_model import BestModelCallback
    from rfdetr.training.callbacks.checkpoints import CheckpointCallback
    from rfdetr.training.callbacks.coco_eval import COCOEvalCallback
    from rfdetr.training.callbacks.drop_path import DropPathCallback
    from rfdetr.training.callbacks.early_stopping import RFDETREarlyStopping
    from rfdetr.training.callbacks.ema import RFDETREMACallback

__all__ = [
    "BestModelCallback",
    "COCOEvalCallback",
    "CheckpointCallback",
    "DropPathCallback",
    "RFDETREMACallback",
    "RFDETREarlyStopping",
]

__getattr__ = lazy_names(
    __name__,
    {
        "BestModelCallback": "best_model",
        "COCOEvalCallback": "coco_eval",
        "CheckpointCallback": "checkpoints",
        "DropPathCallback": "drop_path",
        "RFDETREMACallback": "ema",
        "RFDETREarlyStopping": "early_stopping",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
