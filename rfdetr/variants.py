"""Detectors and their configurations under an import path of the public package."""

from __future__ import annotations

from rfdetr import *  # noqa: F403
from rfdetr import __all__ as _detectors
from rfdetr import __getattr__  # noqa: F401
from rfdetr.config import *  # noqa: F403
from rfdetr.config import __all__ as _configurations

__all__ = [*_detectors, *_configurations]  # noqa: PLE0604
