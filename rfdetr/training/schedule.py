"""How many optimizer steps a fit has, and the learning rate at each of them."""

from __future__ import annotations

import math

import pytorch_lightning as pl

from rfdetr.config import TrainConfig

ENDLESS_EPOCHS = 100  # length of the schedule, in epochs, when max_epochs is unlimited
STREAM_STEPS = 1000  # optimizer steps counted as one epoch of data without a length


def planned_steps(trainer: pl.Trainer) -> tuple[int, int]:
    """(optimizer steps of the fit, optimizer steps per epoch), as Lightning will run them."""
    total = trainer.estimated_stepping_batches  # builds the training loader if it is finite
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    if math.isinf(per_epoch):
        epochs = max(1, trainer.max_epochs or 1)
        per_epoch = STREAM_STEPS if math.isinf(total) else total // epochs
    if math.isinf(total):
        total = math.ceil(per_epoch) * ENDLESS_EPOCHS
    return max(1, int(total)), max(1, math.ceil(per_epoch))


def lr_factor(
    step: int, *, total_steps: int, steps_per_epoch: int, train_config: TrainConfig
) -> float:
    """Factor on every base rate after `step` optimizer steps of `total_steps`.

    Linear warm-up, then half a cosine down to `lr_min_factor`, or one tenfold drop after `lr_drop`
    epochs, warm-up included.
    """
    warmup = int(steps_per_epoch * train_config.warmup_epochs)
    if step < warmup:
        return step / max(1, warmup)
    if train_config.lr_scheduler == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        low = train_config.lr_min_factor
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 if step < train_config.lr_drop * steps_per_epoch else 0.1
