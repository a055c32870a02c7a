"""`RFDETRDataModule` under the import path of the public package."""

from __future__ import annotations

from rfdetr.training.datamodule import RFDETRDataModule

__all__ = ["RFDETRDataModule"]
