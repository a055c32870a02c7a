"""Losses of the training steps, logged together for several steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TrainingLog:
    """Sums of the losses since they were last logged.

    Lightning's `log` takes several kernels and 0.5 ms of the host per value. For 18 values of every
    step that is longer than the optimizer takes, so they are added up in one tensor first.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        """Empty, or what `state` of a checkpoint contains."""
        state = state or {}
        self._names: list[str] = list(state.get("names", []))
        self._sums: Tensor | None = state.get("sums")
        self._count = int(state.get("count", 0))

    @torch.no_grad()
    def add(self, values: dict[str, Tensor], count: int) -> None:
        """Add the mean losses of a batch of `count` images. The names are always the same."""
        batch = torch.stack(list(values.values())) * count
        self._sums = batch if self._sums is None else self._sums.to(batch.device) + batch
        self._names, self._count = list(values), self._count + count

    def take(self) -> tuple[dict[str, Tensor], int]:
        """Mean of every loss over the images since the last call, and the number of images."""
        sums, count = self._sums, self._count
        assert sums is not None
        self._sums, self._count = None, 0
        return dict(zip(self._names, (sums / count).unbind(), strict=True)), count

    def state(self) -> dict[str, Any]:
        """What has not been logged yet, for a checkpoint inside an epoch."""
        if self._sums is None:
            return {}
        return {"names": self._names, "sums": self._sums.cpu(), "count": self._count}


def logs_now(trainer: Any, batch_idx: int) -> bool:
    """Whether losses are logged after this batch: the first and the last one, and some between.

    Those between are the batches whose values Lightning passes to the loggers.
    """
    if batch_idx == 0 or trainer.is_last_batch:
        return True
    step = trainer.global_step + 1
    return bool(step % max(1, trainer.log_every_n_steps) == 0 or step == trainer.max_steps)
