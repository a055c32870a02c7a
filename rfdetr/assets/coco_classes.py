"""The COCO classes by category id, under the import path of the public package."""

from __future__ import annotations

from rfdetr.data.coco_names import COCO_CATEGORIES as COCO_CLASSES
from rfdetr.data.coco_names import COCO_NAMES as COCO_CLASS_NAMES

__all__ = ["COCO_CLASSES", "COCO_CLASS_NAMES"]
