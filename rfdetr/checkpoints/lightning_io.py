"""Checkpoint files as Lightning reads and writes them; `build_trainer` installs this plugin.

Separate from `convert`, which works without importing Lightning.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import Tensor

from rfdetr.checkpoints.convert import LEGACY_NOTE, as_lightning_checkpoint
from rfdetr.checkpoints.safe_io import StrPath, load_file, save_file
from rfdetr.files import atomic_path

SPAWN_HANDOVER_NAME = ".temp.ckpt"  # bare weights that spawned processes pass to their parent


class LegacyCheckpointIO(TorchCheckpointIO):
    """Reads every generation of checkpoint as a Lightning dictionary, safely; writes atomically."""

    def load_checkpoint(
        self, path: StrPath, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load `path` onto the CPU, always with `weights_only=True`, whatever the caller passes.

        Raises FileNotFoundError, or CheckpointError for a damaged, refused or foreign file.
        """
        del map_location, weights_only
        content = load_file(path)
        if Path(path).name == SPAWN_HANDOVER_NAME:
            return dict(content)
        checkpoint: dict[str, Any] = as_lightning_checkpoint(content, os.fspath(path))
        if checkpoint.get(LEGACY_NOTE):
            warnings.warn(checkpoint[LEGACY_NOTE], UserWarning, stacklevel=2)
        return checkpoint

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: StrPath, storage_options: Any = None
    ) -> None:
        """Write in one step: an interrupted write leaves the previous file in place.

        With WriteBeside as `storage_options` it returns once the state is copied.
        """
        if storage_options is None:
            save_file(checkpoint, path)
        elif isinstance(storage_options, WriteBeside):
            storage_options.run(_write, snapshot(checkpoint), Path(path), storage_options.kept)
        else:
            raise TypeError("storage_options is not supported: checkpoints are local files.")


Storages = dict[tuple[str, int], Any]  # copies by the device and address of the original


class WriteBeside(NamedTuple):
    """How to write beside the training: `run(work, *args)` starts work in another thread."""

    run: Callable[..., None]
    kept: Path | None = None  # a second name for the file


def _write(checkpoint: dict[str, Any], path: Path, kept: Path | None) -> None:
    save_file(checkpoint, path)
    if kept is not None:
        with atomic_path(kept) as temporary:
            try:
                os.link(path, temporary)  # `path` is never changed, only replaced
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)


def snapshot(value: Any) -> Any:
    """A copy on the CPU that later training steps do not change; shared memory stays shared."""
    return _copied(value, {})


def _copied(value: Any, storages: Storages) -> Any:
    if isinstance(value, Tensor):
        return _copied_tensor(value, storages)
    if type(value) in (dict, OrderedDict):
        copied = type(value)((k, _copied(v, storages)) for k, v in value.items())
        vars_of = getattr(value, "__dict__", None)  # a state dict's metadata
        if vars_of:
            copied.__dict__.update(copy.deepcopy(vars_of))
        return copied
    if type(value) in (list, tuple):
        return type(value)(_copied(v, storages) for v in value)
    return copy.deepcopy(value)


def _copied_tensor(value: Tensor, storages: Storages) -> Tensor:
    value = value.detach()
    if value.layout is not torch.strided or type(value) is not Tensor:
        return value.cpu().clone()
    own: Any = value.untyped_storage()
    key = (value.device.type, own.data_ptr())
    if key not in storages:
        storages[key] = own.clone() if value.device.type == "cpu" else own.cpu()
    empty = torch.empty(0, dtype=value.dtype)
    return empty.set_(storages[key], value.storage_offset(), value.shape, value.stride())
