"""`RFDETRModule` under the import path of the public package."""

from __future__ import annotations

from rfdetr.training.module import RFDETRModelModule, RFDETRModule

__all__ = ["RFDETRModelModule", "RFDETRModule"]
