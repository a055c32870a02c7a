"""The content of the best `.pth` files of a training: weights under legacy names, plain settings.

Legacy names let the public RF-DETR tools load the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from rfdetr.checkpoints.legacy_names import ENCODER_PREFIX, to_legacy
from rfdetr.checkpoints.record import plain
from rfdetr.config import ModelConfig, TrainConfig
from rfdetr.model.lora import merge_adapters

# Model settings that legacy readers look up under `args`.
_ARGS_FIELDS = (
    "resolution",
    "patch_size",
    "num_windows",
    "segmentation_head",
    "num_queries",
    "group_detr",
    "num_select",
)
_RESUME_KEYS = ("epoch", "optimizer", "lr_scheduler", "ema_model", "loops", "callbacks")


def best_payload(
    network_state: Mapping[str, Tensor],
    model_config: ModelConfig,
    train_config: TrainConfig | None = None,
    class_names: list[str] | None = None,
    epoch: int | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """The content of a best file; it loads with plain `torch.load(weights_only=True)`.

    `network_state` is the state dict of the network (no prefix); LoRA adapters are merged into
    their weights. `extra` adds keys, for example the source and the value of the metric.
    """
    names = list(class_names or [])
    num_classes = len(network_state["class_embed.bias"]) - 1
    settings = {**model_config.model_dump(mode="json"), "num_classes": num_classes}
    args = {} if train_config is None else train_config.model_dump(mode="json")
    args |= {name: settings[name] for name in _ARGS_FIELDS}
    args |= {"class_names": names, "num_classes": num_classes}
    weights = to_legacy(_with_mask_token(merge_adapters(network_state)))
    payload: dict[str, Any] = {
        "model": {name: value.detach().cpu() for name, value in weights.items()},
        "args": args,
        "class_names": list(names),
        "num_classes": num_classes,
        "model_name": type(model_config).__name__.removesuffix("Config"),
        "model_config": settings,
        "rfdetr_version": version("rfdetr-pipeline"),
    }
    if epoch is not None:
        payload["epoch"] = epoch
    payload.update(plain(extra))
    return payload


def stripped_payload(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `checkpoint_best_total.pth`: `payload` without anything to resume from."""
    return {key: value for key, value in payload.items() if key not in _RESUME_KEYS}


def _with_mask_token(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Legacy files always contain the mask token, which nothing reads."""
    token = state.get(f"{ENCODER_PREFIX}cls_token")
    if token is None or f"{ENCODER_PREFIX}mask_token" in state:
        return dict(state)
    return {**state, f"{ENCODER_PREFIX}mask_token": torch.zeros_like(token[0])}
