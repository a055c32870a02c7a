"""The detector classes under the import path of the public package."""

from __future__ import annotations

from rfdetr import *  # noqa: F403
from rfdetr import __all__ as _detectors
from rfdetr import __getattr__  # noqa: F401
from rfdetr.assets.coco_classes import COCO_CLASS_NAMES, COCO_CLASSES

__all__ = ["COCO_CLASSES", "COCO_CLASS_NAMES", *_detectors]  # noqa: PLE0604
