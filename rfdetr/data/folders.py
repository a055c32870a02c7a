"""Files below a folder, as checks and training see them, and where a missing file may be."""

from __future__ import annotations

import difflib
import os
import unicodedata
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
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself
            continue
        if is_folder:
            place = os.path.realpath(entry.path)
            if place not in parents:
                yield from _walk(folder, f"{prefix}{entry.name}/", (*parents, place))
        elif is_file:
            yield prefix, entry.name


def fold(name: str) -> str:
    """A name as file systems compare it that ignore case and Unicode composition."""
    return unicodedata.normalize("NFC", name).casefold()


def spelling(name: str, actual: str) -> str:
    """How two names differ that `fold` to the same text."""
    if name.casefold() == actual.casefold():
        return "in upper and lower case"
    return "in the Unicode form of a letter: composed (NFC) or decomposed (NFD)"


class _Present:
    """Files below a folder by path, by name, by name without suffix, and by folded path."""

    def __init__(self, files: Sequence[str]) -> None:
        self.paths = set(files)
        self.names: dict[str, list[str]] = defaultdict(list)
        self.stems: dict[str, list[str]] = defaultdict(list)
        self.folded = {fold(file): file for file in reversed(files)}
        for file in files:
            name = file.rsplit("/", 1)[-1]
            self.names[name].append(file)
            self.stems[os.path.splitext(name)[0]].append(file)  # noqa: PTH122


def missing_hints(folder: Path, names: Sequence[str]) -> list[str]:
    """For each name of a missing file below `folder`: what may be meant; empty if unknown."""
    if not names:
        return []
    present = _Present(list_files(folder).visible)
    return [_hint(name, present, nearest=number < NEAREST) for number, name in enumerate(names)]


def _hint(name: str, present: _Present, *, nearest: bool) -> str:
    slashed = name.replace("\\", "/")
    decoded = unquote(slashed)
    plain = os.path.normpath(decoded.strip())
    causes = ["it has backslashes, write forward slashes"] if slashed != name else []
    causes += ["it is URL-encoded"] if decoded != slashed else []
    causes += ["it has spaces around it"] if decoded.strip() != decoded else []
    cause = f"{' and '.join(causes)}; " if causes else ""
    if plain in present.paths:
        return f"{cause}{plain} exists"
    actual = present.folded.get(fold(plain))
    if actual is not None:
        return f"{cause}{actual} exists: it differs {spelling(plain, actual)}"
    found = _elsewhere(plain.rsplit("/", 1)[-1], present, nearest=nearest)
    return f"{cause}{found}" if found else cause.rstrip("; ")


def _elsewhere(base: str, present: _Present, *, nearest: bool) -> str:
    """A file of this name or of a similar one in any folder."""
    same, stems = present.names.get(base, []), present.stems.get(base, [])
    if len(same) == 1:
        return f"{same[0]} exists: the folder in the name is wrong"
    if same:
        return f"{len(same)} other folders have a file of that name"
    if len(stems) == 1:
        return f"{stems[0]} exists: the name has no suffix"
    close = difflib.get_close_matches(base, present.names, n=1, cutoff=0.8) if nearest else []
    return f"the nearest name is {present.names[close[0]][0]}" if close else ""
