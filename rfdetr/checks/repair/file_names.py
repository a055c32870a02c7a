"""Finds the image file that an annotation file means."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from rfdetr.data.decode import IMAGE_SUFFIXES, file_size
from rfdetr.data.folders import fold, list_files

Size = tuple[int, int] | None  # width, height


class Wanted(NamedTuple):
    """A file name without a file, and the size that its record gives."""

    name: str
    size: Size


class ImageFinder:
    """Image files below `root` that no record names directly (`claimed`, relative to `root`)."""

    def __init__(self, root: Path, claimed: Collection[str]) -> None:
        self._root = root
        self._by_path: dict[str, list[str]] = defaultdict(list)
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for file in list_files(root).visible:
            path = PurePosixPath(file)
            if path.suffix.lower() in IMAGE_SUFFIXES and file not in claimed:
                self._by_path[fold(file)].append(file)
                self._by_name[fold(path.name)].append(file)
                self._by_stem[fold(path.stem)].append(file)

    def find_all(self, folder: str, wanted: Sequence[Wanted]) -> dict[str, str]:
        """File name -> file relative to `root`, for the names with one certain answer.

        `folder` is the images folder of the split, relative to `root`.
        """
        sizes = dict(wanted)
        found = {name: self._find(folder, name, size) for name, size in sizes.items()}
        uses = Counter(found.values())
        return {name: file for name, file in found.items() if file and uses[file] == 1}

    def _find(self, folder: str, name: str, size: Size) -> str | None:
        forms = list(dict.fromkeys(_forms(name)))
        for form in forms:
            for tail in _tails(form):
                for path in (f"{folder}/{tail}" if folder != "." else tail, tail):
                    one = self._only(self._inside(folder, self._by_path.get(fold(path), ())), size)
                    if one:
                        return one
        for form in forms:
            base = PurePosixPath(form)
            same_name = self._by_name.get(fold(base.name), ())
            same_stem = self._by_stem.get(fold(base.stem), ())
            one = (
                self._only(self._inside(folder, same_name), size)
                or self._only(self._of_size(same_name, size), size)
                or self._only(self._of_size(self._inside(folder, same_stem), size), size)
            )
            if one:
                return one
        return None

    @staticmethod
    def _inside(folder: str, files: Sequence[str]) -> list[str]:
        return [file for file in files if folder == "." or file.startswith(f"{folder}/")]

    def _only(self, files: Sequence[str], size: Size) -> str | None:
        """The only file, or the only one of the right size."""
        if len(files) > 1:
            files = self._of_size(files, size)
        return files[0] if len(files) == 1 else None

    def _of_size(self, files: Sequence[str], size: Size) -> list[str]:
        """Files of this size, also if EXIF turns them; none if the size is unknown."""
        if size is None:
            return []
        return [file for file in files if file_size(self._root / file) in (size, size[::-1])]


def _forms(name: str) -> Iterator[str]:
    """The name as written, with forward slashes, and decoded as a URL."""
    plain = name.strip()
    for text in (plain, plain.replace("\\", "/")):
        yield text
        if "%" in text:
            yield unquote(text)
    if "://" in plain or "?" in plain:
        try:
            url = urlsplit(plain)
        except ValueError:
            return
        yield unquote(url.path)
        yield from parse_qs(url.query).get("d", ())  # Label Studio's local files
    folder, _, last = plain.rpartition("/")
    if re.match("[0-9a-f]{8}-.", last):  # Label Studio's uploads
        yield f"{folder}/{last[9:]}" if folder else last[9:]


def _tails(form: str) -> Iterator[str]:
    """The relative path, then without its first folder, and so on."""
    parts = [
        part
        for part in PurePosixPath(form).parts
        if part not in ("/", "//", ".", "..") and not re.fullmatch("[A-Za-z]:", part)
    ]
    for start in range(len(parts)):
        yield "/".join(parts[start:])


def claimed_files(folders: Mapping[str, str], names: Mapping[str, Collection[str]]) -> set[str]:
    """Files that records of any split name directly, relative to the dataset."""
    return {
        (PurePosixPath(folders[split]) / name).as_posix()
        for split, listed in names.items()
        for name in listed
    }
