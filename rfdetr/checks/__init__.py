"""Dataset checks: every defect of a dataset at once, before a GPU is rented.

Importing this package imports nothing heavy; names are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rfdetr.lazy import lazy_names

if TYPE_CHECKING:
    from rfdetr.checks.check import check_dataset
    from rfdetr.checks.codes import CODES
    from rfdetr.checks.dataset_report import DatasetReport, Finding
    from rfdetr.checks.options import CheckConfig

__all__ = ["CODES", "CheckConfig", "DatasetReport", "Finding", "check_dataset"]

__getattr__ = lazy_names(
    __name__,
    {
        "CODES": "codes",
        "CheckConfig": "options",
        "DatasetReport": "dataset_report",
        "Finding": "dataset_report",
        "check_dataset": "check",
    },
)
