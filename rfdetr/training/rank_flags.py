"""Flags that any rank may set and all ranks act on together."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch

_SECONDS = 1.0  # between two exchanges
_MOST_STEPS = 20


class RankFlags:
    """Exchanges flags about once a second instead of in every step.

    Every exchange is one collective, in which ranks also agree when the next one follows: the
    slowest of them decides how many steps a second has. One process needs no exchange.
    """

    def __init__(self) -> None:
        self.restart(0)

    def restart(self, step: int) -> None:
        """Exchange at the next call; `step` is that of the last one, equal on all ranks."""
        self._next, self._step, self._at = step, step, time.monotonic()

    def at(self, trainer: pl.Trainer, step: int, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank; all False before the next exchange is due."""
        if trainer.world_size > 1 and step < self._next:
            return [False] * len(flags)
        now = time.monotonic()
        pace = (now - self._at) / max(1, step - self._step)  # seconds per step
        *found, slowest = largest(trainer, [*map(float, flags), pace])
        self._at, self._step = now, step
        self._next = step + max(1, min(_MOST_STEPS, int(_SECONDS / max(slowest, 1e-3))))
        return [flag > 0 for flag in found]

    @staticmethod
    def now(trainer: pl.Trainer, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank."""
        return [flag > 0 for flag in largest(trainer, [float(flag) for flag in flags])]


def largest(trainer: pl.Trainer, values: list[float]) -> list[float]:
    """The largest value of all ranks, each."""
    if trainer.world_size == 1:
        return values
    given = torch.tensor(values, device=trainer.strategy.root_device)
    total: Any = trainer.strategy.reduce(given, reduce_op="max")  # type: ignore[arg-type]
    found: list[float] = total.tolist()
    return found
