"""The line that a training prints after each epoch, and how another process reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NUMBER = r"-|[-+.\dinfae]+"
_LINE = re.compile(
    rf"epoch (\d+)/(\d+)  loss ({_NUMBER})  mAP ({_NUMBER})"
    r"(?:  (?:(\d+)h )?(?:(\d+)m )?(\d+)s left)?"
)


@dataclass(frozen=True)
class EpochProgress:
    """Epoch `epoch` of `of` is done (counted from 1); `left_s` is an estimate in seconds."""

    epoch: int
    of: int
    loss: float | None = None
    mAP: float | None = None  # noqa: N815 - the name of the metric
    left_s: int = 0

    def line(self) -> str:
        """`epoch 3/50  loss 4.1500  mAP 0.6100  1m 12s left`; `-` for a value that is missing."""
        numbers = ("-" if value is None else f"{value:.4f}" for value in (self.loss, self.mAP))
        text = "epoch {}/{}  loss {}  mAP {}".format(self.epoch, self.of, *numbers)
        return f"{text}  {duration(self.left_s)} left" if self.epoch < self.of else text

    @classmethod
    def parse(cls, line: str) -> EpochProgress | None:
        """The progress in a line of output, if the line reports one."""
        found = _LINE.fullmatch(line.strip())
        if found is None:
            return None
        epoch, of, loss, quality, *times = found.groups()
        hours, minutes, seconds = (int(part or 0) for part in times)
        left = 3600 * hours + 60 * minutes + seconds
        try:
            return cls(int(epoch), int(of), _value(loss), _value(quality), left)
        except ValueError:
            return None


def _value(text: str) -> float | None:
    return None if text == "-" else float(text)


def duration(seconds: float) -> str:
    """`45s`, `1m 12s` or `2h 5m 0s`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours}h"] * (hours > 0) + [f"{minutes}m"] * (hours + minutes > 0)
    return " ".join([*parts, f"{rest}s"])
