"""Small networks, images and targets for tests that need no reference numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rfdetr.config import ModelConfig, RFDETRNanoConfig, RFDETRSegNanoConfig
from rfdetr.model.network import RFDETRNetwork, build_network

_SMALL = {
    "encoder_dim": 48,
    "encoder_depth": 4,
    "encoder_heads": 3,
    "out_feature_indexes": [1, 3],
    "resolution": 96,
    "hidden_dim": 32,
    "dec_layers": 2,
    "dim_feedforward": 64,
    "sa_nheads": 4,
    "ca_nheads": 8,
    "num_queries": 12,
    "num_select": 12,
    "group_detr": 3,
    "num_classes": 5,
    "pretrain_weights": None,
}


def small_config(*, masks: bool = False, **changes: Any) -> ModelConfig:
    cls = RFDETRSegNanoConfig if masks else RFDETRNanoConfig
    return cls(**{**_SMALL, **changes})


def small_network(*, masks: bool = False, **changes: Any) -> RFDETRNetwork:
    torch.manual_seed(0)
    return build_network(small_config(masks=masks, **changes))


def images(count: int = 2, side: int = 96) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def targets(counts: tuple[int, ...] = (2, 1), *, masks: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for count in counts:
        boxes = torch.rand(count, 4, generator=generator) * 0.4 + 0.3
        target = {"boxes": boxes, "labels": torch.randint(0, 5, (count,), generator=generator)}
        if masks:
            target["masks"] = torch.rand(count, 48, 48, generator=generator) > 0.5
        made.append(target)
    return made


def weighted(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return torch.stack([losses[name] * weight for name, weight in weights.items()]).sum()
