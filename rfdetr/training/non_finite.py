"""Stop at the first loss that is not finite, on all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rfdetr.errors import NonFiniteLossError

if TYPE_CHECKING:
    from rfdetr.training.module import RFDETRModule


def check_finite(
    module: RFDETRModule, loss: Tensor, terms: dict[str, Tensor], targets: Sequence[dict[str, Any]]
) -> None:
    """Raise NonFiniteLossError that names terms, step and image ids; every rank raises."""
    finite = bool(torch.isfinite(loss.detach()))
    trainer = module._trainer
    if trainer is None:
        everywhere = finite
    else:
        everywhere = trainer.strategy.reduce_boolean_decision(finite, all=True)
    if everywhere:
        return
    step = 0 if trainer is None else trainer.global_step
    if finite:
        raise NonFiniteLossError(
            f"Another rank met a loss that is not finite at step {step}; its message has the "
            "terms and the images."
        )
    raise NonFiniteLossError(_text(step, terms, targets))


def _text(step: int, terms: dict[str, Tensor], targets: Sequence[dict[str, Any]]) -> str:
    wrong = [f"{name} = {value.item()}" for name, value in terms.items() if not value.isfinite()]
    ids = [int(target["image_id"]) for target in targets if "image_id" in target]
    return (
        f"The loss is not finite at step {step}: {', '.join(wrong) or 'the weighted sum'}. "
        f"Image ids of the batch: {ids}. Look at these images and their boxes; if they are fine, "
        "lower lr or clip_max_norm, lengthen warmup_epochs, or train in float32 (amp=False)."
    )
