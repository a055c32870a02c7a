"""Checks and normalises a checkpoint before Lightning loads it into the module."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from rfdetr.checkpoints.adapt import add_silent_classes, fold_adapters
from rfdetr.checkpoints.convert import LEGACY_EMA_KEY, LEGACY_MARKER, MODULE_PREFIX
from rfdetr.checkpoints.pretrained import OPTIONAL_SUFFIXES
from rfdetr.checkpoints.record import CheckpointRecord, parse_checkpoint
from rfdetr.checkpoints.structure import structure_mismatch, warn_differing_settings
from rfdetr.config import ModelConfig
from rfdetr.errors import CheckpointError


def normalise_loaded(
    checkpoint: dict[str, Any], network: nn.Module, config: ModelConfig, path: str
) -> list[str] | None:
    """Give `checkpoint` a Lightning `state_dict` for `network`; returns its class names.

    EMA weights of a legacy file go under LEGACY_EMA_KEY with the names of `network`. Raises
    CheckpointError when weights and network differ in structure or class count, when they share no
    tensor, or when a full checkpoint lacks one.
    """
    found = parse_checkpoint(checkpoint, path)
    full = found.kind == "lightning" and not checkpoint.get(LEGACY_MARKER)
    record = found if full else _with_extra_row(found, config)
    record = fold_adapters(record, config)
    _check_fit(network, config, record, full=full)
    if "state_dict" not in checkpoint or record.has_legacy_names or record is not found:
        checkpoint["state_dict"] = {MODULE_PREFIX + k: v for k, v in record.weights.items()}
    if checkpoint.get("ema_model") or checkpoint.get(LEGACY_EMA_KEY):
        checkpoint[LEGACY_EMA_KEY] = record.ema
    return record.class_names


def _with_extra_row(record: CheckpointRecord, config: ModelConfig) -> CheckpointRecord:
    """Give old YOLO-format files, whose head has N rows for N classes, the extra row."""
    names, classes = record.class_names, config.num_classes
    old = len(names) == classes if names else record.setting("dataset_file") == "yolo"
    if record.num_classes != classes - 1 or not old:
        return record
    rank_zero_warn(
        f"{record.path} has a class head of {classes} rows for {classes} classes, as older "
        "trainings on YOLO-format data wrote it: the extra row of the current layout is added."
    )
    return dataclasses.replace(
        record,
        weights=add_silent_classes(record.weights, classes + 1),
        ema=record.ema and add_silent_classes(record.ema, classes + 1),
        num_classes=classes,
    )


def _check_fit(
    network: nn.Module, config: ModelConfig, record: CheckpointRecord, *, full: bool
) -> None:
    """`full`: the file is a full checkpoint, in which nothing may be missing."""
    own = network.state_dict()
    problem = (
        structure_mismatch(record, config)
        or _class_problem(record, config)
        or _shape_problem(record, own)
    )
    if problem is not None:
        raise CheckpointError(problem)
    warn_differing_settings(record, config)
    missing = [n for n in own if n not in record.weights and not n.endswith(OPTIONAL_SUFFIXES)]
    unexpected = [name for name in record.weights if name not in own]
    difference = (
        f"{len(missing)} tensors of the model are missing in it: {', '.join(missing) or 'none'}; "
        f"{len(unexpected)} are not of this model: {', '.join(unexpected) or 'none'}."
    )
    if len(unexpected) == len(record.weights) or (full and missing):
        raise CheckpointError(
            f"{record.path} is not a checkpoint of this model. Pass the checkpoint of the run "
            f"you want to resume. {difference}"
        )
    if missing or unexpected:
        warnings.warn(f"{record.path}: {difference}", UserWarning, stacklevel=2)


def _class_problem(record: CheckpointRecord, config: ModelConfig) -> str | None:
    classes = record.num_classes
    if classes is None or classes == config.num_classes:
        return None
    return (
        f"{record.path} has {classes} classes, the model {config.num_classes}. A run resumes "
        "with the same classes. To fine-tune these weights on other classes, pass the file as "
        "pretrain_weights of the model configuration instead of resume / ckpt_path."
    )


def _shape_problem(record: CheckpointRecord, own: dict[str, Any]) -> str | None:
    weights = record.weights
    wrong = [n for n, value in weights.items() if n in own and own[n].shape != value.shape]
    if not wrong:
        return None
    first = wrong[0]
    table = ""
    if first.endswith("pos_embed"):
        side = math.isqrt(weights[first].shape[-2] - 1)
        table = f" The file has positional_encoding_size {side}."
    return (
        f"{record.path} has {len(wrong)} tensors of another shape, first {first}: "
        f"{tuple(weights[first].shape)} instead of {tuple(own[first].shape)}.{table} Resume "
        "needs the model configuration of the saved run; to start another model from these "
        "weights, pass the file as pretrain_weights."
    )
