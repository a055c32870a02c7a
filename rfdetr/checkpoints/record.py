"""Reads a checkpoint file of any generation, `.pth` or `.ckpt`, into one `CheckpointRecord`.

The generations: engine files of releases 1.0 to 1.4 (`model`, `args` as a namespace, `epoch`,
`ema_model`), published and stripped weights (`model`, perhaps `args`), and Lightning checkpoints
(`state_dict`).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from rfdetr.checkpoints.legacy_names import from_legacy
from rfdetr.checkpoints.safe_io import StrPath, load_file
from rfdetr.errors import CheckpointError

Weights = dict[str, Tensor]
Kind = Literal["engine", "weights", "lightning"]

_WRAPPER_PREFIXES = re.compile(r"^(model\.|module\.|_orig_mod\.)+")
_IGNORED = ("_kp_active_mask", "n_averaged")  # not weights: of newer releases, of AveragedModel
_CLASS_HEADS = ("class_embed.bias", "transformer.enc_out_class_embed.0.bias")
_EMA_KEYS = ("average_model_state_dict", "averaged_state_dict", "ema_state_dict")


@dataclass(frozen=True)
class CheckpointRecord:
    """One checkpoint: weights under our names, and what the file says about the run.

    `kind` is "engine" (written by a legacy training loop, with an epoch), "weights" (published or
    stripped) or "lightning". `epoch` is the last finished one, counted from 0. `num_classes` comes
    from the rows of the class head, the only reliable source. `label_offset` is 1 if label i + 1
    means `class_names[i]` (fine-tuned before 1.5 on COCO-format data), otherwise 0.
    `averaged` says whether `weights` are EMA weights, None if unknown; `weights_epoch` is the epoch
    that they come from, also in files that nothing resumes from.
    `has_legacy_names` says whether the file uses other tensor names than ours.
    """

    path: str
    kind: Kind
    weights: Weights
    ema: Weights | None = None
    args: dict[str, Any] = field(default_factory=dict)
    model_config: dict[str, Any] = field(default_factory=dict)
    model_name: str | None = None
    epoch: int | None = None
    global_step: int | None = None
    class_names: list[str] | None = None
    num_classes: int | None = None
    label_offset: int = 0
    averaged: bool | None = None
    weights_epoch: int | None = None
    has_legacy_names: bool = True

    def setting(self, name: str) -> Any:
        """A setting of the model that the file records, or None."""
        value = self.model_config.get(name)
        return self.args.get(name) if value is None else value

    @property
    def square(self) -> bool:
        """Whether the run resized images to squares.

        True for a file without a model section: its False may only be the default of its writer.
        """
        return not self.model_config or self.args.get("square_resize_div_64") is not False


def read_checkpoint(path: StrPath, *, mmap: bool = False) -> CheckpointRecord:
    """Read a checkpoint of any generation.

    `mmap=True` maps the tensors instead of copying them. Raises FileNotFoundError, or
    CheckpointError for a file that is damaged, refused, not a dictionary, or without weights.
    """
    return parse_checkpoint(load_file(path, mmap=mmap), os.fspath(path))


def parse_checkpoint(content: Any, path: str) -> CheckpointRecord:
    """The record of a loaded dictionary; `path` is only used in messages."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} contains a {type(content).__name__}, not a checkpoint dictionary with the "
            "key 'model'."
        )
    key = "model" if "model" in content else "state_dict"
    if key not in content:
        raise CheckpointError(
            f"{path} has no key 'model' (nor 'state_dict'); keys found: "
            f"{', '.join(map(repr, content)) or 'none'}. It is not an RF-DETR checkpoint."
        )
    raw = _tensors(content[key], key, path)
    weights = _under_our_names(raw)
    epoch = _int_or_none(content.get("epoch"))
    kind: Kind = "weights" if epoch is None else "engine"
    hyper = plain(content.get("hyper_parameters")) or {}
    args = plain(content.get("args")) or {**hyper, **_section(hyper, "train_config")}
    model_config = plain(content.get("model_config")) or _section(hyper, "model_config")
    names = class_names_of(args.get("class_names") or content.get("class_names"))
    num_classes = _class_count(weights)
    return CheckpointRecord(
        path=path,
        kind="lightning" if key == "state_dict" else kind,
        weights=weights,
        ema=_ema_weights(content, path),
        args=args,
        model_config=model_config,
        model_name=_str_or_none(content.get("model_name") or hyper.get("model_name")),
        epoch=epoch,
        global_step=_int_or_none(content.get("global_step")),
        class_names=names,
        num_classes=num_classes,
        label_offset=_label_offset(content.get("args"), names, num_classes),
        averaged=content.get("averaged", False if key == "state_dict" else None),
        weights_epoch=_int_or_none(content.get("weights_epoch", epoch)),
        has_legacy_names=any(_without_wrappers(name) not in weights for name in raw),
    )


def _class_count(weights: Mapping[str, Tensor]) -> int | None:
    """Rows of the class head minus the surplus row; None for a file without a head."""
    for name in _CLASS_HEADS:
        if name in weights:
            return len(weights[name]) - 1
    return None


def class_names_of(value: Any) -> list[str] | None:
    """Class names from a list or from a dictionary keyed by number; None if there are none."""
    if isinstance(value, Mapping):
        ordered = sorted(value.items(), key=lambda item: int(item[0]))
        return [str(name) for _, name in ordered] or None
    if isinstance(value, list | tuple):
        return [str(name) for name in value] or None
    return None


def plain(value: Any) -> Any:
    """`value` with namespaces as dictionaries, paths as strings, tuples and sets as lists."""
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, pathlib.PurePath):
        return str(value)
    return value


def _tensors(value: Any, key: str, path: str) -> Weights:
    """The tensors of an entry of the file, under the names in the file."""
    if not isinstance(value, Mapping) or not value:
        raise CheckpointError(f"{path}: '{key}' is not a dictionary of tensors.")
    wrong = [str(name) for name, item in value.items() if not isinstance(item, Tensor)]
    if wrong:
        raise CheckpointError(f"{path}: '{key}' has entries that are not tensors: {wrong[:5]}.")
    return {name: item for name, item in value.items() if not name.endswith(_IGNORED)}


def _under_our_names(tensors: Mapping[str, Tensor]) -> Weights:
    return from_legacy({_without_wrappers(name): value for name, value in tensors.items()})


def _without_wrappers(name: str) -> str:
    """`name` without `model.`, `module.` and `_orig_mod.`, which wrapping modules add."""
    return _WRAPPER_PREFIXES.sub("", name).replace("._orig_mod.", ".")


def _ema_weights(content: Mapping[str, Any], path: str) -> Weights | None:
    """The EMA weights, wherever each generation stores them."""
    for key in ("ema_model", "legacy_ema_state_dict"):
        if content.get(key):
            return _under_our_names(_tensors(content[key], key, path))
    callbacks = content.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        for key in _EMA_KEYS if isinstance(state, Mapping) else ():
            if state.get(key):
                return _under_our_names(_tensors(state[key], key, path))
    return None


def _label_offset(args: Any, names: list[str] | None, num_classes: int | None) -> int:
    """1 for old files trained on COCO-format data, whose labels are the category ids 1..N."""
    if not isinstance(args, argparse.Namespace) or names is None:
        return 0
    return int(num_classes == len(names) and vars(args).get("dataset_file") != "yolo")


def _section(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    section = values.get(key)
    return dict(section) if isinstance(section, Mapping) else {}


def _int_or_none(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) else None


def _str_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
