"""The files of the copy: linked or copied from the source, replaced when they change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from rfdetr.files import write_text_atomic


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system supports it, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def copy_tree(
    source: Path, target: Path, place: Callable[[Path, Path], None] = link_or_copy
) -> list[str]:
    """Fill the folder `target` with the files of `source`; return the links that lead nowhere.

    Symbolic links become the files and folders that they lead to, so that the copy does not depend
    on other places; a link to a folder that contains it is not followed. `place` creates one file.
    """
    broken: list[str] = []
    waiting: list[tuple[Path, frozenset[Path]]] = [(Path(), frozenset())]
    while waiting:
        relative, above = waiting.pop()
        real = (source / relative).resolve()
        if real in above:
            continue
        (target / relative).mkdir(parents=True, exist_ok=True)
        for path in sorted((source / relative).iterdir()):
            inside = relative / path.name
            if path.is_dir():
                waiting.append((inside, above | {real}))
            elif path.is_file():
                place(path.resolve(), target / inside)
            elif path.is_symlink():
                broken.append(inside.as_posix())
    return broken


def is_utf8(file: Path) -> bool:
    """Whether a text file is as training reads all of them."""
    try:
        file.read_bytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def replace_text(file: Path, text: str) -> None:
    """Write a new file in place of a link to the source."""
    file.unlink(missing_ok=True)
    write_text_atomic(file, text)


def replace_bytes(file: Path, data: bytes) -> None:
    """Write a new file in place of a link to the source."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)
