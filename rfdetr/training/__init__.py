"""The training stack on PyTorch Lightning. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rfdetr.compat import absent
from rfdetr.installation import warn_about_public_distribution

if TYPE_CHECKING:
    from pytorch_lightning import seed_everything

    from rfdetr.checkpoints.convert import convert_legacy_checkpoint
    from rfdetr.training.callbacks import (
        BestModelCallback,
        COCOEvalCallback,
        DropPathCallback,
        RFDETREarlyStopping,
        RFDETREMACallback,
    )
    from rfdetr.training.cli import RFDETRCli
    from rfdetr.training.datamodule import RFDETRDataModule
    from rfdetr.training.module import RFDETRModelModule, RFDETRModule
    from rfdetr.training.trainer import build_trainer

__all__ = [
    "BestModelCallback",
    "COCOEvalCallback",
    "DropPathCallback",
    "RFDETRCli",
    "RFDETRDataModule",
    "RFDETREMACallback",
    "RFDETREarlyStopping",
    "RFDETRModelModule",
    "RFDETRModule",
    "build_trainer",
    "convert_legacy_checkpoint",
    "seed_everything",
]

_HOMES = {
    "RFDETRModule": "rfdetr.training.module",
    "RFDETRModelModule": "rfdetr.training.module",
    "RFDETRCli": "rfdetr.training.cli",
    "RFDETRDataModule": "rfdetr.training.datamodule",
    "build_trainer": "rfdetr.training.trainer",
    "convert_legacy_checkpoint": "rfdetr.checkpoints.convert",
    "seed_everything": "pytorch_lightning",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise absent(__name__, name)
    warn_about_public_distribution()
    home = importlib.import_module(_HOMES.get(name, "rfdetr.training.callbacks"))
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
