"""Losses of the training steps, logged together for several steps."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from rfdetr.training.lightning_adapter import attached_trainer


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

    def log(
        self, module: LightningModule, terms: dict[str, Tensor], batch_size: int, batch_idx: int
    ) -> None:
        """Log the losses of a batch and the learning rates; nothing without a trainer.

        `terms` are the loss terms and their weighted sum "loss", all means over the batch.
        """
        trainer: Any = attached_trainer(module)
        if trainer is None:
            return
        config: Any = module.train_config
        values = {f"train/{name}": value.detach() for name, value in terms.items()}
        if config.train_log_on_step:
            steps = {f"{name}_step": value for name, value in values.items()}
            module.log_dict(steps, on_step=True, on_epoch=False, batch_size=batch_size)
        self.add(values, batch_size)
        if not logs_now(trainer, batch_idx):
            return
        means, count = self.take()
        module.log_dict(
            means,
            on_step=False,
            on_epoch=True,
            batch_size=count,
            sync_dist=config.train_log_sync_dist,
        )
        module.log("loss", values["train/loss"], prog_bar=True, logger=False, batch_size=batch_size)
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        rates_now = {"train/lr": rates[0], "train/lr_min": min(rates), "train/lr_max": max(rates)}
        module.log_dict(rates_now, on_step=True, on_epoch=False, batch_size=batch_size)

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
