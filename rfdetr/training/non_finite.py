"""Stop at the first loss that is not finite, on all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from rfdetr.errors import NonFiniteLossError


def check_finite(
    loss: Tensor,
    terms: dict[str, Tensor],
    targets: Sequence[dict[str, Any]],
    trainer: pl.Trainer | None,
) -> None:
    """Raise NonFiniteLossError with the terms, the step and the image ids; every rank raises."""
    finite = bool(torch.isfinite(loss.detach()))
    step = 0 if trainer is None else trainer.global_step
    everywhere = finite
    if trainer is not None:
        everywhere = trainer.strategy.reduce_boolean_decision(finite, all=True)
    if everywhere:
        return
    if finite:
        raise NonFiniteLossError(
            f"The loss of another rank is not finite at step {step}; its message lists the terms "
            "and the images."
        )
    wrong = [f"{name} = {value.item()}" for name, value in terms.items() if not value.isfinite()]
    ids = [int(target["image_id"]) for target in targets if "image_id" in target]
    raise NonFiniteLossError(
        f"The loss is not finite at step {step}: {', '.join(wrong) or 'the weighted sum'}. "
        f"Image ids of the batch: {ids}. Check these images and their boxes; if they are fine, "
        "lower lr or clip_max_norm, lengthen warmup_epochs, or train in float32 (amp=False)."
    )
