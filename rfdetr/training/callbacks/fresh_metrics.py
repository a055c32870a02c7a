"""Metrics that were logged in the validation that just ended, without values of earlier epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytorch_lightning as pl
from torch import Tensor


class FreshMetrics:
    """`trainer.callback_metrics` keeps the values of earlier epochs; this tells which are new."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._before: dict[str, Tensor] = {}

    def start(self, trainer: pl.Trainer) -> None:
        """Remember what is there before the validation."""
        metrics = trainer.callback_metrics
        self._before = {name: metrics[name] for name in self.names if name in metrics}

    def read(self, trainer: pl.Trainer, name: str) -> float | None:
        """The new value of `name`, or None when it is absent, old, undefined (-1) or not finite."""
        value = trainer.callback_metrics.get(name)
        if value is None or value is self._before.get(name):
            return None
        number = float(value)
        return number if math.isfinite(number) and number >= 0 else None
