"""RF-DETR detection and instance segmentation with a retraining pipeline around it.

Importing this package imports nothing heavy; names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rfdetr.detector import RFDETR
    from rfdetr.variants import (
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
]

_OTHER = re.compile(r"rfdetr-\d.*\.(dist|egg)-info$")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("rfdetr-pipeline")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("rfdetr.variants"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _warn_about_other_distribution() -> None:
    """The public `rfdetr` distribution installs files under the same import name."""
    for folder in sys.path:
        try:
            with os.scandir(folder or ".") as entries:
                found = next((entry.name for entry in entries if _OTHER.match(entry.name)), None)
        except OSError:
            continue
        if found:
            warnings.warn(
                f"{folder} also holds the distribution {found.rsplit('.', 1)[0]}, which has the "
                "same import name: its files and those of rfdetr-pipeline mix. Run `pip uninstall "
                "rfdetr rfdetr-pipeline`, then install rfdetr-pipeline again.",
                RuntimeWarning,
                stacklevel=3,
            )
            return


_warn_about_other_distribution()
