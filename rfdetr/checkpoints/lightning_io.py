"""Checkpoint files as Lightning reads and writes them (training specification, section 14).

Apart from `checkpoint`, which converts files without importing Lightning.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from rfdetr.checkpoints.convert import NOTE, normalise_legacy
from rfdetr.checkpoints.safe_io import StrPath, load_file, save_file

HAND_OVER = ".temp.ckpt"  # bare weights that Lightning's spawned processes give to their parent


class LegacyCheckpointIO(TorchCheckpointIO):
    """Reads every generation of checkpoint as a Lightning dictionary, safely; writes atomically."""

    def load_checkpoint(
        self, path: StrPath, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load `path` onto the CPU; `weights_only` is always on, whatever the caller says.

        Raises FileNotFoundError, or CheckpointError for a damaged, refused or foreign file.
        """
        del map_location, weights_only
        content = load_file(path)
        if Path(path).name == HAND_OVER:
            return dict(content)
        checkpoint: dict[str, Any] = normalise_legacy(content, os.fspath(path))
        if checkpoint.get(NOTE):
            warnings.warn(checkpoint[NOTE], UserWarning, stacklevel=2)
        return checkpoint

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: StrPath, storage_options: Any = None
    ) -> None:
        """Write in one step: an interrupted write leaves the previous file."""
        if storage_options is not None:
            raise TypeError("storage_options is not supported: checkpoints are local files.")
        save_file(checkpoint, path)
