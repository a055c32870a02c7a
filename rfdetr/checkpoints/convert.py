"""Checkpoint files of training: reading old ones, converting them, writing ours.

Training specification, sections 11.3 and 14. Full checkpoints (`.ckpt`) hold our names; the best
files (`.pth`) hold legacy names, so that the public tools load them.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfdetr.checkpoints.legacy_names import OURS, PARTS, to_legacy
from rfdetr.checkpoints.proof import ConversionReport, prove_conversion
from rfdetr.checkpoints.record import Container, parse_container, plain
from rfdetr.checkpoints.safe_io import StrPath, load_file, write_torch
from rfdetr.config import ModelConfig, TrainConfig
from rfdetr.errors import CheckpointError
from rfdetr.files import atomic_path

logger = logging.getLogger(__name__)

PREFIX = "model."
EMA_KEY = "legacy_ema_state_dict"
MARKER = "legacy_checkpoint_format"
NOTE = "legacy_note"


def normalise_legacy(checkpoint: Mapping[str, Any], path: str = "the checkpoint") -> dict[str, Any]:
    """A dictionary that Lightning resumes from, for a checkpoint of any generation.

    Full checkpoints of this package come back as they are. Others get `state_dict` under our names,
    the epoch counter, averaged weights under `legacy_ema_state_dict` (legacy names),
    plain `hyper_parameters`, and no optimizer state: it belongs to another grouping of parameters.
    Raises CheckpointError for anything that is no checkpoint.
    """
    container = parse_container(checkpoint, path)
    counted = "fit_loop" in (checkpoint.get("loops") or {})
    if container.kind == "lightning" and not container.old_names and counted:
        return dict(checkpoint)
    return _resumable(container)


def _resumable(container: Container) -> dict[str, Any]:
    finished = -1 if container.epoch is None else container.epoch
    result: dict[str, Any] = {
        "state_dict": {PREFIX + name: value for name, value in container.weights.items()},
        "epoch": max(finished, 0),
        "global_step": (container.global_step or 0) if finished >= 0 else 0,
        "loops": _loops(finished + 1),
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "pytorch-lightning_version": version("pytorch-lightning"),
        "hyper_parameters": container.args,
        "model_name": container.model_name,
        "class_names": container.class_names,
        MARKER: True,
        NOTE: _note(container),
    }
    if container.model_config:
        result["model_config"] = container.model_config
    if container.ema is not None:
        result[EMA_KEY] = to_legacy(container.ema)
    return result


def convert_legacy_checkpoint(old_path: StrPath, new_path: StrPath) -> ConversionReport:
    """Write a legacy checkpoint as one that `trainer.fit(ckpt_path=...)` resumes from.

    Returns the proof: how names were mapped, and the largest difference between the outputs of
    both files on a fixed input (between their tensors where no network can be built from the
    file). Weights, averaged weights, epoch and settings travel; the optimizer state does not.
    Raises FileNotFoundError, or CheckpointError for a file that is damaged, refused, no legacy
    checkpoint, of another network, or the target itself. The target appears complete and compared,
    or not at all.
    """
    old, new = os.fspath(old_path), os.fspath(new_path)
    if Path(old).resolve() == Path(new).resolve():
        raise CheckpointError(f"{old}: the converted file would overwrite it; name another path.")
    container = parse_container(load_file(old, mmap=True, verify=False), old)
    if container.kind == "lightning":
        raise CheckpointError(f"{old} is a Lightning file already; pass it as ckpt_path.")
    if not any(name.startswith(PARTS) for name in container.weights):
        raise CheckpointError(
            f"{old} is no checkpoint of this detector: none of its {len(container.weights)} "
            f"tensors has a name that RF-DETR uses; found: {', '.join(container.weights)}."
        )
    with atomic_path(new) as temporary:
        report = prove_conversion(
            container, lambda: write_torch(_resumable(container), temporary), temporary, new
        )
    logger.info("%s", report.summary)
    if report.max_abs_difference > 0:
        warnings.warn(f"The conversion is not exact. {report.summary}", UserWarning, stacklevel=2)
    return report


def best_payload(
    network_state: Mapping[str, Tensor],
    model_config: ModelConfig,
    train_config: TrainConfig | None = None,
    class_names: list[str] | None = None,
    epoch: int | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """The content of a best file: legacy tensor names, plain settings, class names.

    It loads with plain `torch.load(weights_only=True)`. `network_state` is the state dict of the
    network (no prefix); adapters are folded into their weights. `extra` adds keys, for example the
    source and the value of the metric.
    """
    from rfdetr import __version__
    from rfdetr.model.lora import merge_adapters

    args = {} if train_config is None else train_config.model_dump(mode="json")
    settings = model_config.model_dump(mode="json")
    args |= {
        name: settings[name]
        for name in ("resolution", "patch_size", "num_windows", "segmentation_head")
    }
    args |= {name: settings[name] for name in ("num_queries", "group_detr", "num_select")}
    weights = to_legacy(_with_mask_token(merge_adapters(network_state)))
    num_classes = len(network_state["class_embed.bias"]) - 1
    args |= {"class_names": list(class_names or []), "num_classes": num_classes}
    settings["num_classes"] = num_classes
    payload: dict[str, Any] = {
        "model": {name: value.detach().cpu() for name, value in weights.items()},
        "args": args,
        "class_names": list(class_names or []),
        "num_classes": num_classes,
        "model_name": type(model_config).__name__.removesuffix("Config"),
        "model_config": settings,
        "rfdetr_version": __version__,
    }
    if epoch is not None:
        payload["epoch"] = epoch
    payload.update(plain(extra))
    return payload


def stripped_payload(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `checkpoint_best_total.pth`: without anything to resume from."""
    dropped = {"epoch", "optimizer", "lr_scheduler", "ema_model", "loops", "callbacks"}
    return {key: value for key, value in payload.items() if key not in dropped}


def _with_mask_token(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Legacy files always hold the mask token, which nothing reads."""
    token = state.get(f"{OURS}cls_token")
    if token is None or f"{OURS}mask_token" in state:
        return dict(state)
    return {**state, f"{OURS}mask_token": torch.zeros_like(token[0])}


def _loops(epoch: int) -> dict[str, Any]:
    """Loop state from which Lightning starts epoch number `epoch` (counted from 0)."""
    progress = dict.fromkeys(("ready", "completed", "started", "processed"), epoch)
    fit = {"state_dict": {}, "epoch_progress": {"total": progress, "current": dict(progress)}}
    return {"fit_loop": fit, "validate_loop": {}, "test_loop": {}, "predict_loop": {}}


def _note(container: Container) -> str:
    if container.epoch is None:
        text = f"{container.path} knows no epoch: starting from these weights at epoch 0."
    else:
        text = (
            f"{container.path} holds no optimizer state that fits here: weights"
            f"{' and averaged weights' if container.ema is not None else ''} are taken over, "
            f"training goes on with epoch {container.epoch + 1}, and the optimizer starts afresh."
        )
    if container.label_offset:
        text += (
            " Its labels are the category ids 1..N of a COCO-format dataset, while labels here "
            "count from 0: the class head learns the new numbers first."
        )
    return text
