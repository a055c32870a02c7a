"""Checkpoint files as Lightning reads and writes them; `build_trainer` installs this plugin.

Separate from `convert`, which works without importing Lightning.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from rfdetr.checkpoints.convert import LEGACY_NOTE, as_lightning_checkpoint
from rfdetr.checkpoints.safe_io import StrPath, load_file, save_file

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
        """Write in one step: an interrupted write leaves the previous file in place."""
        if storage_options is not None:
            raise TypeError("storage_options is not supported: checkpoints are local files.")
        save_file(checkpoint, path)
