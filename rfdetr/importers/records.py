"""What every importer returns: images with their objects, class names, and what was skipped."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from rfdetr.data.decode import IMAGE_SUFFIXES
from rfdetr.data.folders import list_files

Box = tuple[float, float, float, float]
Polygons = list[list[float]]

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class ImportedObject:
    """One object. `box` is x0, y0, x1, y1 in pixels; `outline` is polygons, RLE or empty."""

    label: str
    box: Box
    outline: Polygons | dict[str, Any] = field(default_factory=list)
    crowd: bool = False


@dataclass
class ImportedImage:
    """One image file with its objects.

    `name` is relative to the source folder; `size` is the (width, height) that the annotations
    state, `content` the image itself where the annotation file contains it.
    """

    name: str
    objects: list[ImportedObject] = field(default_factory=list)
    split: str | None = None
    size: tuple[int, int] | None = None
    content: bytes | None = None


@dataclass
class Collection:
    """A dataset as one importer read it.

    `root` is the folder that the images' names are relative to. `classes` are in the order of the
    source. `skipped` lists by reason what was left out.
    `upright` says that the tool shows images rotated by their EXIF tag, so coordinates follow that
    view, unless stated sizes prove otherwise.
    """

    format: str
    root: Path = Path()
    images: list[ImportedImage] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    upright: bool = False

    def skip(self, reason: str, what: str) -> None:
        """Count something that is left out."""
        self.skipped[reason].append(what)

    def skip_unlisted(self, images: Iterable[str], listed: Container[str]) -> None:
        """Count the images that no annotation file names."""
        for image in images:
            if image not in listed:
                self.skip("images that no annotation file lists", image)

    def used_classes(self) -> list[str]:
        """The classes of the source, then those that only objects name, sorted."""
        named = {found.label for image in self.images for found in image.objects}
        return [*self.classes, *sorted(named - set(self.classes))]


class SourceFiles:
    """The visible files of a source folder, and the search for an image by a foreign name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = list_files(root).visible
        self.images = [n for n in self.names if PurePosixPath(n).suffix.lower() in IMAGE_SUFFIXES]
        self._by_base: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        self._by_folded: dict[str, list[str]] = defaultdict(list)
        for name in self.images:
            path = PurePosixPath(name)
            self._by_base[path.name].append(name)
            self._by_stem[path.stem].append(name)
            self._by_folded[_folded(path.name)].append(name)

    def with_suffix(self, *suffixes: str) -> list[str]:
        """Names with one of these suffixes, given in lower case."""
        return [name for name in self.names if PurePosixPath(name).suffix.lower() in suffixes]

    def path(self, name: str) -> Path:
        """The file of a name."""
        return self.root / name

    def find(self, wanted: str, *, near: str = "", split: str | None = None) -> str | None:
        """The image that a foreign path means: always a file below the source folder.

        Folders of `wanted` need not exist here: paths of other machines, URLs and backslashes are
        accepted, and names that differ in case, Unicode form or a missing suffix, if nothing fits
        better. Among files of one name, the one whose last folders agree wins, then one of
        `split`, then the one beside `near`. None if there is no file or no single best one.
        """
        slashed = wanted.replace("\\", "/")
        for text in dict.fromkeys((slashed, unquote(slashed))):
            path = PurePosixPath(text)
            named = [self._by_base.get(path.name, []), self._by_folded.get(_folded(path.name), [])]
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                named.append(self._by_stem.get(path.name, []))
            for places in named:
                found = self._best(places, text, near, split)
                if found is not None:
                    return found
        return None

    def find_stem(self, stem: str, *, near: str = "", split: str | None = None) -> str | None:
        """The image with this name before the suffix; as `find`."""
        return self._best(self._by_stem.get(stem, []), stem, near, split)

    def find_of(self, annotation: str, stated: object, split: str | None) -> str | None:
        """The image of an annotation file, by the name that the file states and by its own.

        A stated name that is not like the file's own is often a copy of another file's.
        """
        stem = PurePosixPath(annotation).stem
        text = stated.strip() if isinstance(stated, str) else ""
        own = PurePosixPath(text.replace("\\", "/")).stem == stem
        named = self.find(text, near=annotation, split=split) if text else None
        if own and named is not None:
            return named
        return self.find_stem(stem, near=annotation, split=split) or named

    @staticmethod
    def _best(places: Sequence[str], wanted: str, near: str, split: str | None) -> str | None:
        if len(places) < 2:
            return places[0] if places else None
        folder = PurePosixPath(near).parent

        def rank(name: str) -> tuple[int, bool, int]:
            common = _common_tail(PurePosixPath(name).parts, PurePosixPath(wanted).parts)
            own = PurePosixPath(name).parent
            return common, split is not None and split_of(name) == split, _common_head(own, folder)

        first, second = sorted(places, key=rank, reverse=True)[:2]
        return first if rank(first) > rank(second) else None


def _folded(name: str) -> str:
    """A name without its case and Unicode form; macOS and Windows do not tell them apart."""
    return unicodedata.normalize("NFC", name).casefold()


def _common_tail(one: Sequence[str], other: Sequence[str]) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    count = 0
    for a, b in pairs:
        if a != b:
            break
        count += 1
    return count


def _common_head(one: PurePosixPath, other: PurePosixPath) -> int:
    count = 0
    for a, b in zip(one.parts, other.parts, strict=False):
        if a != b:
            break
        count += 1
    return count


def split_of(name: str) -> str | None:
    """The split that a folder of a relative path names: train2017, Validation, obj_test_data."""
    for folder in reversed(PurePosixPath(name).parts[:-1]):
        if found := split_word(folder):
            return found
    return None


def split_word(text: str) -> str | None:
    """The one split that the words of a folder or file name mean, else None."""
    found = {SPLIT_WORDS[word] for word in WORD.findall(text.lower()) if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def bounds(points: Sequence[float]) -> Box:
    """The box around x, y, x, y ..."""
    xs, ys = points[::2], points[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def around(polygons: Polygons) -> Box:
    """The box around polygons."""
    return bounds([value for polygon in polygons for value in polygon])
