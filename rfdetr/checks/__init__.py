"""Dataset checks: every defect of a dataset at once, before a GPU is rented.

Importing this package imports nothing heavy; names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rfdetr.checks.check import check_dataset
    from rfdetr.checks.codes import CODES
    from rfdetr.checks.dataset_report import DatasetReport, Finding
    from rfdetr.checks.options import CheckConfig

__all__ = ["CODES", "CheckConfig", "DatasetReport", "Finding", "check_dataset"]
MODULES = {
    "CODES": "codes",
    "CheckConfig": "options",
    "DatasetReport": "dataset_report",
    "Finding": "dataset_report",
    "check_dataset": "check",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
