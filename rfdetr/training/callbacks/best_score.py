"""The best value of one metric, and which of two files is the better one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class BestScore:
    """The best value so far of the live or of the EMA weights, its epoch, step and file.

    The field `averaged` (EMA weights) keeps the name that it has in checkpoints and records.
    """

    metric: str
    file: str
    averaged: bool
    value: float | None = None
    epoch: int | None = None
    step: int | None = None

    def observe(self, value: float | None, epoch: int, step: int | None = None) -> bool:
        """True when `value` is strictly better than all before; the first one always is."""
        if value is None or (self.value is not None and value <= self.value):
            return False
        self.value, self.epoch, self.step = value, epoch, step
        return True

    def forget(self) -> None:
        """Start again: the next value is the best."""
        self.value = self.epoch = self.step = None


def better_of(live: BestScore, ema: BestScore) -> BestScore | None:
    """The better score, the live one in a tie; None before the first evaluation."""
    if ema.value is not None and (live.value is None or ema.value > live.value):
        return ema
    return live if live.value is not None else None
