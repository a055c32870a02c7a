"""RF-DETR detection and instance segmentation with a retraining pipeline around it.

Importing this package imports nothing heavy; names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from rfdetr.compat import AbsentModules, absent
from rfdetr.installation import warn_about_public_distribution

if TYPE_CHECKING:
    from rfdetr.detector import (
        RFDETR,
        RFDETRBase,
        RFDETRLarge,
        RFDETRLargeDeprecated,
        RFDETRMedium,
        RFDETRNano,
        RFDETRSeg2XLarge,
        RFDETRSegLarge,
        RFDETRSegMedium,
        RFDETRSegNano,
        RFDETRSegPreview,
        RFDETRSegSmall,
        RFDETRSegXLarge,
        RFDETRSmall,
        from_checkpoint,
    )

__all__ = [
    "RFDETR",
    "RFDETRBase",
    "RFDETRLarge",
    "RFDETRLargeDeprecated",
    "RFDETRMedium",
    "RFDETRNano",
    "RFDETRSeg2XLarge",
    "RFDETRSegLarge",
    "RFDETRSegMedium",
    "RFDETRSegNano",
    "RFDETRSegPreview",
    "RFDETRSegSmall",
    "RFDETRSegXLarge",
    "RFDETRSmall",
    "from_checkpoint",
]

# found as attributes of the package after `import rfdetr`
_MODULES = frozenset({"assets", "config", "datasets", "detr", "training", "variants"})

sys.meta_path.append(AbsentModules)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rfdetr-pipeline")
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise absent(__name__, name)
    warn_about_public_distribution()
    return getattr(importlib.import_module("rfdetr.detector"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
