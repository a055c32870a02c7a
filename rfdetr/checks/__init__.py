"""Dataset checks: every defect of a dataset at once, before a GPU is rented."""

from rfdetr.checks.check import check_dataset
from rfdetr.checks.codes import CODES
from rfdetr.checks.dataset_report import DatasetReport, Finding
from rfdetr.checks.options import CheckConfig

__all__ = ["CODES", "CheckConfig", "DatasetReport", "Finding", "check_dataset"]
