"""Adapts a checkpoint's weights to a model of another class count, query count or resolution.

Everything else must fit already: see `structure.structure_mismatch`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rfdetr.checkpoints.record import CheckpointRecord, Weights
from rfdetr.checkpoints.structure import POSITION_TABLE, position_grid_side
from rfdetr.config import ModelConfig
from rfdetr.errors import CheckpointError
from rfdetr.model.backbone import resize_pos_embed
from rfdetr.model.lora import merge_adapters

QUERY_TABLES = ("refpoint_embed.weight", "query_feat.weight")  # (groups * queries, ...)
SILENT_BIAS = -100.0  # of a class that is never predicted; finite in half precision
_CLASS_HEAD = re.compile(r"(transformer\.enc_out_class_embed\.\d+|class_embed)\.(weight|bias)$")
_GROUP_TENSOR = re.compile(r"transformer\.enc_[a-z_]+\.(\d+)\.")


@dataclass
class AdaptedWeights:
    """Weights that fit the model, and one sentence for every change that was made to them."""

    weights: Weights
    changes: list[str] = field(default_factory=list)


def adapt_weights(record: CheckpointRecord, config: ModelConfig) -> AdaptedWeights:
    """Adapt class head, query groups and position table to `config`.

    Surplus groups are dropped. Raises CheckpointError when the file has too few queries.
    """
    adapted = AdaptedWeights(dict(fold_adapters(record, config).weights))
    _drop_surplus_groups(adapted, config)
    _adapt_class_head(adapted, config.num_classes + 1)
    _adapt_queries(adapted, record, config)
    _adapt_positions(adapted, config.positional_encoding_size)
    return adapted


def fold_adapters(record: CheckpointRecord, config: ModelConfig) -> CheckpointRecord:
    """`record` with its LoRA adapters merged into the weights, if the network has none."""
    if config.backbone_lora or not any(name.endswith(".lora_a") for name in record.weights):
        return record
    ema = record.ema and merge_adapters(record.ema)
    return dataclasses.replace(record, weights=merge_adapters(record.weights), ema=ema)


def resize_rows(tensor: Tensor, rows: int) -> Tensor:
    """The first `rows` rows; where there are fewer, the rows repeat from the start."""
    copies = -(-rows // len(tensor))
    return torch.cat([tensor] * copies)[:rows] if copies > 1 else tensor[:rows]


def add_silent_classes(weights: Weights, rows: int) -> Weights:
    """The weights with every class head extended to `rows` rows; the new classes never fire."""
    extended = dict(weights)
    for name, value in weights.items():
        if _CLASS_HEAD.match(name) and len(value) < rows:
            fill = SILENT_BIAS if name.endswith("bias") else 0.0
            extra = value.new_full((rows - len(value), *value.shape[1:]), fill)
            extended[name] = torch.cat([value, extra])
    return extended


def slice_query_groups(tensor: Tensor, queries: int, groups: int, per_group: int | None) -> Tensor:
    """The first `queries` rows of each of the first `groups` groups, (groups * queries, D).

    `tensor` is (rows, D), group after group, `per_group` rows each. Without `per_group` the first
    queries * groups rows are taken, which may mix groups, as the reference implementation does.
    Raises CheckpointError when there are too few rows.
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


def _drop_surplus_groups(adapted: AdaptedWeights, config: ModelConfig) -> None:
    surplus = set()
    for name in list(adapted.weights):
        match = _GROUP_TENSOR.match(name)
        if match and int(match.group(1)) >= config.group_detr:
            surplus.add(match.group(1))
            del adapted.weights[name]
    if surplus:
        adapted.changes.append(f"{len(surplus)} surplus query groups of the file dropped")


def _adapt_class_head(adapted: AdaptedWeights, rows: int) -> None:
    """Cut or repeat rows; the single row of an old one-class file is not doubled for one class."""
    single = len(adapted.weights.get("class_embed.bias", ())) == 1
    if single and rows == 2:
        adapted.changes.append("a second class that never fires added to the class head of one row")
        adapted.weights = add_silent_classes(adapted.weights, rows)
        return
    for name, value in adapted.weights.items():
        if _CLASS_HEAD.match(name) and len(value) != rows:
            if name == "class_embed.bias":
                adapted.changes.append(f"class head from {len(value)} to {rows} rows")
            adapted.weights[name] = resize_rows(value, rows)


def _adapt_queries(adapted: AdaptedWeights, record: CheckpointRecord, config: ModelConfig) -> None:
    queries, groups = config.num_queries, config.group_detr
    for name in QUERY_TABLES:
        value = adapted.weights.get(name)
        if value is None:
            continue
        per_group = _queries_per_group(record, len(value))
        if len(value) == queries * groups and per_group in (None, queries):
            continue
        adapted.weights[name] = slice_query_groups(value, queries, groups, per_group)
        adapted.changes.append(f"{name} from {len(value)} to {queries * groups} rows")


def _queries_per_group(record: CheckpointRecord, rows: int) -> int | None:
    """Queries per group by the file's settings; one of the two numbers is enough."""
    queries, groups = record.setting("num_queries"), record.setting("group_detr")
    if isinstance(queries, int) and queries > 0 and rows % queries == 0:
        return queries
    if isinstance(groups, int) and groups > 0 and rows % groups == 0:
        return rows // groups
    return None


def _adapt_positions(adapted: AdaptedWeights, side: int) -> None:
    old = position_grid_side(adapted.weights)
    if old is None or old == side:
        return
    table = adapted.weights[POSITION_TABLE]
    adapted.weights[POSITION_TABLE] = resize_pos_embed(table, side, side)
    adapted.changes.append(f"position table from {old} x {old} to {side} x {side}")


def _too_few_queries(rows: int, wanted: int, queries: int, groups: int) -> CheckpointError:
    return CheckpointError(
        f"The file has {rows} query rows ({groups} groups of {queries}), the configuration needs "
        f"{wanted}. Lower num_queries or group_detr, or train without these weights."
    )
