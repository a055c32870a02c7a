"""Turns a checkpoint of any generation into one that Lightning resumes from.

`convert_legacy_checkpoint` writes the result as a `.ckpt` file, with proof that nothing was lost.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rfdetr.checkpoints.conversion_proof import ConversionReport, prove_conversion
from rfdetr.checkpoints.legacy_names import TENSOR_NAME_PREFIXES, to_legacy
from rfdetr.checkpoints.record import CheckpointRecord, parse_checkpoint
from rfdetr.checkpoints.safe_io import StrPath, load_file, write_torch
from rfdetr.errors import CheckpointError
from rfdetr.files import atomic_path

logger = logging.getLogger(__name__)

MODULE_PREFIX = "model."  # the network is `RFDETRModule.model`
LEGACY_EMA_KEY = "legacy_ema_state_dict"
LEGACY_MARKER = "legacy_checkpoint_format"
LEGACY_NOTE = "legacy_note"


def as_lightning_checkpoint(
    checkpoint: Mapping[str, Any], path: str = "the checkpoint"
) -> dict[str, Any]:
    """A dictionary that Lightning resumes from, for a checkpoint of any generation.

    Checkpoints written by RFDETRModule are returned unchanged. Others get a `state_dict` under our
    names, the epoch counter, EMA weights under `legacy_ema_state_dict` (legacy names), plain
    `hyper_parameters`, and no optimizer state, because their parameters are grouped differently.
    Raises CheckpointError for anything that is not a checkpoint.
    """
    record = parse_checkpoint(checkpoint, path)
    has_counters = "fit_loop" in (checkpoint.get("loops") or {})
    if record.kind == "lightning" and not record.has_legacy_names and has_counters:
        return dict(checkpoint)
    return _resumable(record)


def convert_legacy_checkpoint(old_path: StrPath, new_path: StrPath) -> ConversionReport:
    """Write a legacy checkpoint as one that `trainer.fit(ckpt_path=...)` resumes from.

    Returns the proof: how tensors were renamed, and the largest difference between the outputs of
    both files on a fixed input (between their tensors where no network can be built from the
    file). Weights, EMA weights, epoch and settings are converted; the optimizer state is not.
    Raises FileNotFoundError, or CheckpointError for a file that is damaged, refused, not a legacy
    checkpoint, of another network, or the target itself. The target appears complete and compared,
    or not at all.
    """
    old, new = os.fspath(old_path), os.fspath(new_path)
    if Path(old).resolve() == Path(new).resolve():
        raise CheckpointError(f"{old}: the converted file would overwrite it; name another path.")
    record = parse_checkpoint(load_file(old, mmap=True, verify=False), old)
    if record.kind == "lightning":
        raise CheckpointError(f"{old} is a Lightning file already; pass it as ckpt_path.")
    if not any(name.startswith(TENSOR_NAME_PREFIXES) for name in record.weights):
        raise CheckpointError(
            f"{old} is not an RF-DETR checkpoint: none of its {len(record.weights)} tensors has a "
            f"name that RF-DETR uses; found: {', '.join(record.weights)}."
        )
    with atomic_path(new) as temporary:
        report = prove_conversion(
            record, lambda: write_torch(_resumable(record), temporary), temporary, new
        )
    logger.info("%s", report.summary)
    if report.max_abs_difference > 0:
        warnings.warn(f"The conversion is not exact. {report.summary}", UserWarning, stacklevel=2)
    return report


def _resumable(record: CheckpointRecord) -> dict[str, Any]:
    finished = -1 if record.epoch is None else record.epoch
    result: dict[str, Any] = {
        "state_dict": {MODULE_PREFIX + name: value for name, value in record.weights.items()},
        "epoch": max(finished, 0),
        "global_step": (record.global_step or 0) if finished >= 0 else 0,
        "loops": _loops(finished + 1),
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "pytorch-lightning_version": version("pytorch-lightning"),
        "hyper_parameters": record.args,
        "model_name": record.model_name,
        "class_names": record.class_names,
        LEGACY_MARKER: True,
        LEGACY_NOTE: _note(record),
    }
    if record.model_config:
        result["model_config"] = record.model_config
    if record.ema is not None:
        result[LEGACY_EMA_KEY] = to_legacy(record.ema)
    return result


def _loops(epoch: int) -> dict[str, Any]:
    """Loop state from which Lightning starts epoch number `epoch` (counted from 0)."""
    progress = dict.fromkeys(("ready", "completed", "started", "processed"), epoch)
    fit = {"state_dict": {}, "epoch_progress": {"total": progress, "current": dict(progress)}}
    return {"fit_loop": fit, "validate_loop": {}, "test_loop": {}, "predict_loop": {}}


def _note(record: CheckpointRecord) -> str:
    """What the user is told when training resumes from this file."""
    if record.epoch is None:
        text = f"{record.path} does not record an epoch: starting from these weights at epoch 0."
    else:
        text = (
            f"{record.path} has no optimizer state that fits this model: weights"
            f"{' and EMA weights' if record.ema is not None else ''} are loaded, training "
            f"continues at epoch {record.epoch + 1}, and the optimizer starts fresh."
        )
    if record.label_offset:
        text += (
            " Its labels are the category ids 1..N of a COCO-format dataset, but labels here "
            "count from 0: the class head first has to learn the new numbers."
        )
    return text
