"""Best files that are already in a folder: of which epoch they are, and where old ones move to."""

from __future__ import annotations

from pathlib import Path

from rfdetr.checkpoints.safe_io import load_file
from rfdetr.errors import CheckpointError
from rfdetr.training.callbacks.best_score import BestScore


def is_newer(score: BestScore, folder: Path) -> bool:
    """Whether the file of `score` in `folder` is of a later epoch than the score."""
    epoch = _stored_epoch(score, folder)
    return epoch is not None and score.epoch is not None and epoch > score.epoch


def is_older(score: BestScore, folder: Path) -> bool:
    """Whether the file of `score` in `folder` is of an earlier epoch than the score."""
    epoch = _stored_epoch(score, folder)
    return epoch is not None and score.epoch is not None and epoch < score.epoch


def _stored_epoch(score: BestScore, folder: Path) -> int | None:
    """Epoch of the file of `score` in `folder`; None without a file for the same metric."""
    file = folder / score.file
    if score.epoch is None or not file.is_file():
        return None
    try:
        stored = load_file(file, mmap=True)
    except CheckpointError:
        return None
    return stored.get("epoch") if stored.get("metric") == score.metric else None


def free_folder(output_dir: Path) -> Path:
    """The first folder `abandoned_N` that does not exist yet."""
    number = 1
    while (folder := output_dir / f"abandoned_{number}").exists():
        number += 1
    return folder
