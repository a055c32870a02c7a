"""Dataset checks: every defect of a dataset at once, before a GPU is rented."""

from rfdetr.data.checks.check import check_dataset
from rfdetr.data.checks.codes import CODES
from rfdetr.data.checks.config import CheckConfig
from rfdetr.data.checks.report import DatasetReport, Finding

__all__ = ["CODES", "CheckConfig", "DatasetReport", "Finding", "check_dataset"]
