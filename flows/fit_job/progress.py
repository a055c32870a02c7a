"""One line of JSON per finished epoch, for the parent process."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ValidationError


class EpochProgress(BaseModel, frozen=True):
    """Epoch `epoch` of `of` is done (counted from 1); `eta_s` is the remaining time in seconds."""

    event: Literal["epoch"] = "epoch"
    epoch: int
    of: int
    loss: float | None = None
    mAP: float | None = None  # noqa: N815 - the name of the metric
    seconds: float
    eta_s: float

    def line(self) -> str:
        """The line that a trainer prints."""
        return self.model_dump_json()


def parse_progress(line: str) -> EpochProgress | None:
    """The progress in a line of output, if the line reports one."""
    if not line.startswith('{"event":"epoch"'):
        return None
    try:
        return EpochProgress.model_validate_json(line)
    except ValidationError:
        return None
