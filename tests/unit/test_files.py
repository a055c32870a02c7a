"""What writers that were killed leave behind."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from rfdetr.files import atomic_path, remove_leftovers


def leftover(target: Path) -> Path:
    """The temporary file of a writer that was killed."""
    with pytest.raises(FileNotFoundError), atomic_path(target) as temporary:
        temporary.write_text("half")
        kept = temporary.rename(temporary.with_suffix(".kept"))
    return kept.rename(temporary)


def test_leftovers_of_a_name_are_removed(tmp_path: Path) -> None:
    left = leftover(tmp_path / "run.json")
    other = leftover(tmp_path / "last.ckpt")
    (tmp_path / "run.json").write_text("whole")
    remove_leftovers(tmp_path, "run.json", idle_s=60)
    assert left.exists(), "it may be written right now"
    os.utime(left, (time.time() - 90, time.time() - 90))
    remove_leftovers(tmp_path, "run.json", idle_s=60)
    assert sorted(tmp_path.iterdir()) == sorted([other, tmp_path / "run.json"])
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "run.json"]


def test_a_failed_write_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with pytest.raises(OSError, match="No space left") as full, atomic_path(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert full.value.filename == str(target)
    with pytest.raises(FileNotFoundError) as missing, atomic_path(target) as temporary:
        temporary.read_text()
    assert missing.value.filename == str(target)
    with pytest.raises(FileNotFoundError) as other, atomic_path(target):
        (tmp_path / "b.txt").read_text()
    assert other.value.filename == str(tmp_path / "b.txt")
