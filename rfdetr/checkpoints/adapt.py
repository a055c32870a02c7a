"""Fitting a checkpoint's weights to a model of another class count, query count or resolution.

Model specification, section 10, and training specification 6.1. What cannot be fitted (another
patch size, width, depth, or a segmentation head on one side only) is named by `structure_problems`.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rfdetr.checkpoints.record import Container, Weights
from rfdetr.config import MODEL_CONFIGS, ModelConfig
from rfdetr.errors import CheckpointError
from rfdetr.model.backbone import resize_position_table
from rfdetr.model.lora import merge_adapters

POSITIONS = "backbone.0.encoder.pos_embed"
PATCHES = "backbone.0.encoder.patch_embed.proj.weight"
QUERIES = ("refpoint_embed.weight", "query_feat.weight")
_HEAD = re.compile(r"(transformer\.enc_out_class_embed\.\d+|class_embed)\.(weight|bias)$")
_GROUP = re.compile(r"transformer\.enc_[a-z_]+\.(\d+)\.")
_UNSEEN = ("num_windows", "out_feature_indexes")
SILENT = -100.0  # bias of a class row that never fires; finite in half precision
_SAMPLES = "transformer.decoder.layers.0.cross_attn.attention_weights.bias"


@dataclass
class Fitted:
    """Weights that fit the model, and one sentence for every change that was made to them."""

    weights: Weights
    changes: list[str] = field(default_factory=list)


def resize_rows(tensor: Tensor, rows: int) -> Tensor:
    """The first `rows` rows; a larger number repeats the rows from the start."""
    copies = -(-rows // len(tensor))
    return torch.cat([tensor] * copies)[:rows] if copies > 1 else tensor[:rows]


def add_silent_rows(weights: Weights, rows: int) -> Weights:
    """The weights with every class head filled up to `rows` by rows that never fire."""
    filled = dict(weights)
    for name, value in weights.items():
        if _HEAD.match(name) and len(value) < rows:
            extra = value.new_full((rows - len(value), *value.shape[1:]), 0.0)
            if name.endswith("bias"):
                extra.fill_(SILENT)
            filled[name] = torch.cat([value, extra])
    return filled


def slice_query_groups(tensor: Tensor, queries: int, groups: int, per_group: int | None) -> Tensor:
    """The first `queries` rows of each of the first `groups` groups of `per_group` rows.

    Without `per_group` the first queries * groups rows, which mixes groups (specification 10).
    Raises CheckpointError when there are not enough rows.
    """
    if per_group is None:
        if queries * groups > len(tensor):
            raise _too_few_queries(len(tensor), queries * groups, queries, groups)
        return tensor[: queries * groups]
    present = len(tensor) // per_group
    if queries > per_group or groups > present:
        raise _too_few_queries(len(tensor), queries * groups, per_group, present)
    table = tensor[: present * per_group].reshape(present, per_group, -1)
    return table[:groups, :queries].reshape(groups * queries, -1)


def fit(container: Container, config: ModelConfig) -> Fitted:
    """Fit head rows, query groups and position table to `config`; surplus groups are left out."""
    fitted = Fitted(dict(without_adapters(container, config).weights))
    _fit_groups(fitted, config)
    _fit_head(fitted, config.num_classes + 1)
    _fit_queries(fitted, container, config)
    _fit_positions(fitted, config.positional_encoding_size)
    return fitted


def without_adapters(container: Container, config: ModelConfig) -> Container:
    """The container with its adapters folded into their weights, for a network without them."""
    if config.backbone_lora or not any(name.endswith(".lora_a") for name in container.weights):
        return container
    ema = container.ema and merge_adapters(container.ema)
    return dataclasses.replace(container, weights=merge_adapters(container.weights), ema=ema)


def structure_problems(container: Container, config: ModelConfig) -> str | None:
    """Why the file cannot fit `config`, and which configuration it fits; None when it can."""
    found = _structure_of_file(container)
    wanted = _structure_of_config(config)
    wrong = [name for name in found if found[name] != wanted[name]]
    if not wrong:
        return None
    differences = "; ".join(
        f"{name} is {found[name]} in the file, {wanted[name]} in the configuration"
        for name in wrong
    )
    return (
        f"{container.path} does not fit {type(config).__name__}: {differences}. "
        f"{_matching_configs(container)}"
    )


def warn_other_settings(container: Container, config: ModelConfig) -> None:
    """UserWarning for settings that no tensor shows and that the file's network had otherwise."""
    saved = {name: container.setting(name) for name in _UNSEEN}
    other = [
        f"{name}={value} (the configuration has {getattr(config, name)})"
        for name, value in saved.items()
        if value is not None and value != getattr(config, name)
    ]
    if other:
        warnings.warn(
            f"{container.path} was trained with {', '.join(other)}: its weights load, but the "
            "network computes something else with them. Set the same in the configuration, or use "
            "RFDETR.from_checkpoint, which takes it from the file.",
            UserWarning,
            stacklevel=2,
        )


def _structure_of_file(container: Container) -> dict[str, Any]:
    weights = container.weights
    found: dict[str, Any] = {}
    if PATCHES in weights:
        found["patch_size"] = weights[PATCHES].shape[-1]
        found["encoder width"] = weights[PATCHES].shape[0]
    if isinstance(container.setting("patch_size"), int):
        found["patch_size"] = container.setting("patch_size")  # must agree too (section 10)
    counted = {
        "encoder blocks": _count(weights, r"backbone\.0\.encoder\.blocks\.(\d+)\."),
        "dec_layers": _count(weights, r"transformer\.decoder\.layers\.(\d+)\."),
    }
    found.update({name: number for name, number in counted.items() if number})
    sizes = {
        "hidden_dim": "transformer.decoder.norm.weight",
        "dim_feedforward": "transformer.decoder.layers.0.linear1.bias",
        "levels * ca_nheads * dec_n_points": _SAMPLES,
    }
    found.update({name: len(weights[key]) for name, key in sizes.items() if key in weights})
    if "backbone.0.encoder.norm.weight" in weights:
        registers = weights.get("backbone.0.encoder.reg_token")
        found["register tokens"] = 0 if registers is None else registers.shape[1]
    levels = _count(weights, r"backbone\.0\.projector\.stages\.(\d+)\.0\.")
    if levels:
        found["projector_scale"] = [_level(weights, i) for i in range(levels)]
    masks = any(name.startswith("segmentation_head.") for name in weights)
    found["segmentation_head"] = masks or bool(container.setting("segmentation_head"))
    return found


def _structure_of_config(config: ModelConfig) -> dict[str, Any]:
    width, depth, _, registers = config.encoder_size
    levels = len(config.projector_scale)
    return {
        "patch_size": config.patch_size,
        "encoder width": width,
        "encoder blocks": depth,
        "register tokens": registers,
        "dec_layers": config.dec_layers,
        "hidden_dim": config.hidden_dim,
        "dim_feedforward": config.dim_feedforward,
        "levels * ca_nheads * dec_n_points": levels * config.ca_nheads * config.dec_n_points,
        "projector_scale": list(config.projector_scale),
        "segmentation_head": config.segmentation_head,
    }


def fitting_configs(container: Container) -> list[type[ModelConfig]]:
    """Released configurations of the file's structure; only those of its resolution, if any."""
    found = _structure_of_file(container)
    table = container.weights.get(POSITIONS)
    near, same = [], []
    for cls in MODEL_CONFIGS.values():
        config = cls(pretrain_weights=None)  # type: ignore[call-arg]
        wanted = _structure_of_config(config)
        if any(found[name] != wanted[name] for name in found):
            continue
        near.append(cls)
        if table is not None and table.shape[1] == 1 + config.positional_encoding_size**2:
            same.append(cls)
    return same or near


def _matching_configs(container: Container) -> str:
    names = [cls.__name__ for cls in fitting_configs(container)]
    if names:
        return f"The file fits {' or '.join(names)}."
    return "No released variant fits; set these fields of a configuration to the file's values."


def _level(weights: Weights, index: int) -> str:
    prefix = f"backbone.0.projector.stages_sampling.{index}.0.0."
    if prefix + "weight" in weights:
        return "P3"
    return "P5" if prefix + "conv.weight" in weights else "P4"


def _count(weights: Weights, pattern: str) -> int:
    found = (re.match(pattern, name) for name in weights)
    return len({match.group(1) for match in found if match})


def _fit_groups(fitted: Fitted, config: ModelConfig) -> None:
    surplus = set()
    for name in list(fitted.weights):
        match = _GROUP.match(name)
        if match and int(match.group(1)) >= config.group_detr:
            surplus.add(match.group(1))
            del fitted.weights[name]
    if surplus:
        fitted.changes.append(f"{len(surplus)} surplus query groups of the file left out")


def _fit_head(fitted: Fitted, rows: int) -> None:
    """Cut or repeat rows; the one row of an old one-class file is not doubled for one class."""
    single = len(fitted.weights.get("class_embed.bias", ())) == 1
    if single and rows == 2:
        fitted.changes.append("a second row that never fires added to the class head of one row")
        fitted.weights = add_silent_rows(fitted.weights, rows)
        return
    for name, value in fitted.weights.items():
        if _HEAD.match(name) and len(value) != rows:
            if name == "class_embed.bias":
                fitted.changes.append(f"class head from {len(value)} to {rows} rows")
            fitted.weights[name] = resize_rows(value, rows)


def _fit_queries(fitted: Fitted, container: Container, config: ModelConfig) -> None:
    queries, groups = config.num_queries, config.group_detr
    for name in QUERIES:
        value = fitted.weights.get(name)
        if value is None:
            continue
        per_group = _queries_per_group(container, len(value))
        if len(value) == queries * groups and per_group in (None, queries):
            continue
        fitted.weights[name] = slice_query_groups(value, queries, groups, per_group)
        fitted.changes.append(f"{name} from {len(value)} to {queries * groups} rows")


def _queries_per_group(container: Container, rows: int) -> int | None:
    """Queries per group by the file's settings; one of the two numbers is enough."""
    queries, groups = container.setting("num_queries"), container.setting("group_detr")
    if isinstance(queries, int) and queries > 0 and rows % queries == 0:
        return queries
    if isinstance(groups, int) and groups > 0 and rows % groups == 0:
        return rows // groups
    return None


def _fit_positions(fitted: Fitted, side: int) -> None:
    table = fitted.weights.get(POSITIONS)
    if table is None or table.shape[1] == 1 + side * side:
        return
    old = round((table.shape[1] - 1) ** 0.5)
    if old * old != table.shape[1] - 1:
        raise CheckpointError(f"The position table of {table.shape[1]} entries is no square grid.")
    fitted.weights[POSITIONS] = resize_position_table(table, side, side)
    fitted.changes.append(f"position table from {old} x {old} to {side} x {side}")


def _too_few_queries(rows: int, wanted: int, queries: int, groups: int) -> CheckpointError:
    return CheckpointError(
        f"The file has {rows} query rows ({groups} groups of {queries}), the configuration needs "
        f"{wanted}. Lower num_queries or group_detr, or train without these weights."
    )
