"""Metrics logged by the latest validation, without leftovers of earlier epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytorch_lightning as pl
from torch import Tensor


class FreshMetrics:
    """Tells new values in `trainer.callback_metrics` from those of earlier epochs."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._before: dict[str, Tensor] = {}

    def start(self, trainer: pl.Trainer) -> None:
        """Remember the values before the validation."""
        metrics = trainer.callback_metrics
        self._before = {name: metrics[name] for name in self.names if name in metrics}

    def read(self, trainer: pl.Trainer, name: str) -> float | None:
        """The new value of `name`, or None if it is missing, old, undefined (-1) or not finite."""
        value = trainer.callback_metrics.get(name)
        if value is None or value is self._before.get(name):
            return None
        number = float(value)
        return number if math.isfinite(number) and number >= 0 else None
