"""Stop at losses that are not finite, on all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor

from rfdetr.errors import NonFiniteLossError

_MOST_STEPS = 50  # between two checks


class _MicroBatch(NamedTuple):
    step: int
    loss: Tensor
    terms: dict[str, Tensor]
    image_ids: list[Any]


class FiniteCheck:
    """Checks the losses of several micro-batches at once.

    Reading a loss waits for the accelerator, and ranks have to stop together. Both happen where
    losses are logged, and before weights are evaluated or saved.
    """

    def __init__(self) -> None:
        self._unchecked: list[_MicroBatch] = []

    @property
    def is_full(self) -> bool:
        """Whether it is time for a check, whatever is logged."""
        return len(self._unchecked) >= _MOST_STEPS

    def add(
        self,
        loss: Tensor,
        terms: dict[str, Tensor],
        targets: Sequence[dict[str, Any]],
        trainer: pl.Trainer | None,
    ) -> None:
        """Remember a micro-batch until the next check."""
        step = 0 if trainer is None else trainer.global_step
        values = {name: value.detach() for name, value in terms.items()}
        ids = [target["image_id"] for target in targets if "image_id" in target]
        self._unchecked.append(_MicroBatch(step, loss.detach(), values, ids))

    def check(self, trainer: pl.Trainer | None) -> None:
        """Raise NonFiniteLossError with the terms, the step and the image ids of the first one.

        Every rank raises; ranks whose losses were finite until then say so.
        """
        seen, self._unchecked = self._unchecked, []
        if not seen:
            return
        finite = torch.stack([batch.loss for batch in seen]).isfinite().tolist()
        own = finite.index(False) if False in finite else len(seen)
        first = own
        if trainer is not None and trainer.world_size > 1:
            place = torch.tensor(own, device=trainer.strategy.root_device)
            first = int(trainer.strategy.reduce(place, reduce_op="min"))  # type: ignore[arg-type]
        if first == len(seen):
            return
        if own > first:
            raise NonFiniteLossError(
                f"The loss of another rank is not finite at step {seen[first].step}; its message "
                "lists the terms and the images."
            )
        _raise(seen[first])


def _raise(batch: _MicroBatch) -> None:
    terms = batch.terms.items()
    wrong = [f"{name} = {value.item()}" for name, value in terms if not value.isfinite()]
    raise NonFiniteLossError(
        f"The loss is not finite at step {batch.step}: {', '.join(wrong) or 'the weighted sum'}. "
        f"Image ids of the batch: {[int(image_id) for image_id in batch.image_ids]}. Check these "
        "images and their boxes; if they are fine, lower lr or clip_max_norm, lengthen "
        "warmup_epochs, or train in float32 (amp=False)."
    )
