"""Datasets in foreign annotation formats, written as a COCO export with splits."""

from rfdetr.importers.archive import opened_source
from rfdetr.importers.convert import ImportReport, import_dataset
from rfdetr.importers.formats import READERS
from rfdetr.importers.split import Shares

__all__ = ["READERS", "ImportReport", "Shares", "import_dataset", "opened_source"]
