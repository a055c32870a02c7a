"""Files below a folder, as checks and training see them, and where a missing file may be."""

from __future__ import annotations

import difflib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

NEAREST = 20  # missing names for which a similar name is looked up


class FolderFiles(NamedTuple):
    """Names relative to the folder, sorted, with forward slashes.

    `hidden` are those that start with a dot, or are below such a folder or __MACOSX: copies that
    notebooks, file managers and archives leave behind. They are never trained.
    """

    visible: list[str]
    hidden: list[str]


def list_files(folder: Path) -> FolderFiles:
    """All files below a folder. Links to folders are followed, a link to a parent is not."""
    found = FolderFiles([], [])
    for prefix, name in _walk(folder, "", (os.path.realpath(folder),)):
        full = prefix + name
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in full.split("/"))
        (found.hidden if hidden else found.visible).append(full)
    found.visible.sort()
    found.hidden.sort()
    return found


def _walk(folder: Path, prefix: str, parents: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(prefix of the subfolder, name) of every file; a link to a missing file is not one."""
    try:
        entries = list(os.scandir(folder / prefix))
    except OSError:
        return
    for entry in entries:
        if entry.is_dir():
            place = os.path.realpath(entry.path)
            if place not in parents:
                yield from _walk(folder, f"{prefix}{entry.name}/", (*parents, place))
        elif entry.is_file():
            yield prefix, entry.name


def missing_hints(folder: Path, names: Sequence[str]) -> list[str]:
    """For each name of a missing file below `folder`: what may be meant; empty if unknown."""
    if not names:
        return []
    present = list_files(folder).visible
    places: dict[str, list[str]] = defaultdict(list)
    for file in present:
        places[file.rsplit("/", 1)[-1]].append(file)
    known = set(present)
    return [
        _hint(name, known, places, nearest=number < NEAREST) for number, name in enumerate(names)
    ]


def _hint(name: str, known: set[str], places: dict[str, list[str]], *, nearest: bool) -> str:
    slashed = name.replace("\\", "/")
    decoded = unquote(slashed)
    base = decoded.rsplit("/", 1)[-1]
    causes = ["it has backslashes, write forward slashes"] if slashed != name else []
    causes += ["it is URL-encoded"] if decoded != slashed else []
    cause = f"{' and '.join(causes)}; " if causes else ""
    if decoded in known:
        return f"{cause}{decoded} exists"
    if len(places.get(base, ())) == 1:
        return f"{cause}{places[base][0]} exists: the folder in the name is wrong"
    if len(places.get(base, ())) > 1:
        return f"{cause}{len(places[base])} other folders have a file of that name"
    close = difflib.get_close_matches(base, places, n=1, cutoff=0.8) if nearest else []
    if close:
        return f"{cause}the nearest name is {places[close[0]][0]}"
    return cause.rstrip("; ")
