"""AdamW with layer-wise learning rates, and optimizer state that is loaded by parameter name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rfdetr.checkpoints.legacy_names import legacy_name
from rfdetr.config import ModelConfig, TrainConfig

ENCODER = "backbone.0.encoder"
DECODER = "transformer.decoder"
UNDECAYED = ("gamma", "pos_embed", "rel_pos", "bias", "norm", "embeddings")
_BLOCK = re.compile(r"\.(?:layer|blocks)\.(\d+)\.")

ParameterGroup = dict[str, Any]


def learning_rate(name: str, model_config: ModelConfig, train_config: TrainConfig) -> float:
    """Base learning rate of the parameter `name`, before the schedule.

    Encoder: `lr_encoder`, decayed per block from the last to the first, and by the component decay
    squared. Decoder: `lr` times the component decay. Everything else: `lr`.
    """
    if name.startswith(ENCODER):
        depth = model_config.out_feature_indexes[-1] + 1
        layer = train_config.lr_vit_layer_decay ** (depth + 1 - _layer_id(name, depth))
        return train_config.lr_encoder * layer * train_config.lr_component_decay**2
    if name.startswith(DECODER):
        return train_config.lr * train_config.lr_component_decay
    return train_config.lr


def weight_decay(name: str, train_config: TrainConfig) -> float:
    """Weight decay of `name`: 0 for biases, norms and embeddings of the encoder.

    UNDECAYED is matched against legacy names, in which layer scales are `lambda1`: they decay.
    """
    undecayed = name.startswith(ENCODER) and any(w in legacy_name(name) for w in UNDECAYED)
    return 0.0 if undecayed else train_config.weight_decay


def _layer_id(name: str, depth: int) -> int:
    legacy = legacy_name(name)
    if "embeddings" in legacy:
        return 0
    block = _BLOCK.search(legacy)
    return int(block.group(1)) + 1 if block else depth + 1


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    model_config: ModelConfig,
    train_config: TrainConfig,
) -> list[ParameterGroup]:
    """Trainable parameters in groups of equal (learning rate, weight decay).

    Order: everything outside encoder and decoder, the encoder by depth, the decoder. `params` holds
    (name, parameter) pairs, so that torch keeps the names in the optimizer's state.
    """
    groups: dict[tuple[int, float, float], ParameterGroup] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        rate = learning_rate(name, model_config, train_config)
        decay = weight_decay(name, train_config)
        part = 1 if name.startswith(ENCODER) else 2 if name.startswith(DECODER) else 0
        new = {"params": [], "lr": rate, "weight_decay": decay}
        groups.setdefault((part, rate, decay), new)["params"].append((name, parameter))
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], key[1], key[2]))]


def build_optimizer(
    network: nn.Module, model_config: ModelConfig, train_config: TrainConfig, *, fused: bool
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; its state is loaded by parameter name, never by position."""
    groups = parameter_groups(network.named_parameters(), model_config, train_config)
    optimizer = torch.optim.AdamW(groups, lr=train_config.lr, fused=fused or None)
    optimizer.register_load_state_dict_pre_hook(_load_by_name)
    return optimizer


def _load_by_name(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The saved moments in this optimizer's own groups.

    Learning rates and weight decays are those of the current configuration. Parameters whose saved
    moments are missing or of another shape start fresh, with one warning.
    """
    saved = _moments_by_name(state)
    groups = optimizer.state_dict()["param_groups"]
    moments: dict[int, Any] = {}
    fresh: list[str] = []
    for own, live in zip(groups, optimizer.param_groups, strict=True):
        for index, name, parameter in zip(
            own["params"], live["param_names"], live["params"], strict=True
        ):
            found = saved.pop(name, None)
            if found is not None and _fits(found, parameter):
                moments[index] = found
            elif found is not None or state["state"]:
                fresh.append(name)
    if fresh:
        more = f" and {len(fresh) - 3} more" if len(fresh) > 3 else ""
        warnings.warn(
            f"The optimizer state in the checkpoint does not fit {len(fresh)} parameters "
            f"({', '.join(fresh[:3])}{more}): they start with fresh AdamW moments.",
            UserWarning,
            stacklevel=2,
        )
    return {"state": moments, "param_groups": groups}


def _moments_by_name(state: dict[str, Any]) -> dict[str, Any]:
    return {
        name: state["state"][index]
        for group in state["param_groups"]
        for name, index in zip(group.get("param_names") or (), group["params"], strict=False)
        if index in state["state"]
    }


def _fits(moments: dict[str, Any], parameter: nn.Parameter) -> bool:
    average = moments.get("exp_avg")
    return isinstance(average, torch.Tensor) and average.shape == parameter.shape
