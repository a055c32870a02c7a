"""YOLO label files to an AnnotationIndex.

Format: https://docs.ultralytics.com/datasets/detect and .../segment.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rfdetr.arrays import Integers
from rfdetr.data.decode import CONVERT, IMAGE_SUFFIXES, UNREAD_SUFFIXES
from rfdetr.data.folders import list_files, missing_hints
from rfdetr.data.index import (
    SHOWN,
    AnnotationIndex,
    PackedStrings,
    PolygonOutlines,
    raise_problems,
)
from rfdetr.data.layouts import Layout, SplitPaths
from rfdetr.data.ledger import (
    LABELS,
    TRAINED,
    SplitLedger,
    count_files,
    count_rows,
    row_accounts,
)
from rfdetr.data.text import read_text, split_lines
from rfdetr.data.yolo_labels import LabelRow, read_labels
from rfdetr.errors import DatasetError

LEAST_SIDE = 1e-6  # fraction of the image; pixels as float32 cannot tell a thinner box from a line


class YoloSplits:
    """Reads the splits of a YOLO layout."""

    def __init__(self, layout: Layout, *, masks: bool = False) -> None:
        self.layout = layout
        self.masks = masks

    def index(self, name: str) -> AnnotationIndex:
        """The index of one split; only a test split may be empty.

        Raises DatasetError that lists every invalid line.
        """
        split, root = self.layout.require(name), self.layout.root
        files = list(dict.fromkeys(image_files(split)))
        if not files and name != "test":
            places = ", ".join(map(str, split.images))
            raise DatasetError(
                f"{places}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) for {name!r}."
                f"{_unread_images(split)}"
            )
        raise_problems(root, _missing_images(root, files), "Fix the list files.")
        rows: list[LabelRow] = []
        first = [0]
        problems: list[str] = []
        labels = LabelFiles()
        paths = [labels.of(file) for file in files]
        for path in paths:
            found, wrong = read_labels(path, len(self.layout.names), self.layout.keypoint_values)
            rows += found
            problems += [f"{path}, {problem}" for problem in wrong]
            first.append(len(rows))
        raise_problems(
            root,
            problems,
            "A line has 5 numbers (class cx cy w h) or a class and at least 3 points (x y).",
        )
        owners = np.repeat(np.arange(len(files)), np.diff(first))
        boxes = np.array([row.box for row in rows], np.float64).reshape(-1, 4)
        accounts = label_accounts(boxes, owners)
        ledger = yolo_ledger(split, files, paths, accounts, owners, root=root)
        kept = np.flatnonzero(accounts == TRAINED)
        starts = np.searchsorted(owners[kept], np.arange(len(files) + 1))
        return self._arrays(files, [rows[i] for i in kept], starts, ledger)

    def _arrays(
        self,
        files: list[Path],
        rows: list[LabelRow],
        first: Integers,
        ledger: SplitLedger,
    ) -> AnnotationIndex:
        root = self.layout.root
        stops = np.cumsum([len(row.polygon) for row in rows], dtype=np.int64)
        lengths = np.diff(stops, prepend=0)
        values = np.array([v for row in rows for v in row.polygon], np.float32)
        return AnnotationIndex(
            root=root,
            names=PackedStrings(os.path.relpath(file, root) for file in files),
            image_ids=np.arange(len(files), dtype=np.int64),
            first=first,
            boxes=np.array([row.box for row in rows], np.float64).reshape(-1, 4),
            labels=np.array([row.label for row in rows], np.int64),
            areas=None,
            crowd=np.zeros(len(rows), np.bool_),
            class_names=self.layout.names,
            num_classes=len(self.layout.names),
            relative=True,
            outlines=PolygonOutlines(values, stops - lengths, stops) if self.masks else None,
            masked=lengths > 0 if self.masks else None,
            ledger=ledger,
        )


def _missing_images(root: Path, files: Sequence[Path]) -> list[str]:
    missing = [file for file in files if not file.is_file()]
    shown = [os.path.relpath(file, root) for file in missing[:SHOWN]]
    hints = missing_hints(root, shown) + [""] * len(missing[SHOWN:])
    return [
        f"image {file} does not exist" + (f" ({hint})" if hint else "")
        for file, hint in zip(missing, hints, strict=True)
    ]


def label_accounts(boxes: npt.NDArray[np.float64], owners: Integers) -> Integers:
    """The account of each label line; `boxes` (n, 4) are x0, y0, x1, y1 in fractions."""
    none = np.zeros(len(boxes), bool)
    return row_accounts(boxes, np.ones((len(boxes), 2)), none, owners, LEAST_SIDE)


def yolo_ledger(
    split: SplitPaths,
    files: Sequence[Path],
    labels: Sequence[Path],
    accounts: Integers,
    owners: Integers,
    *,
    root: Path,
    refused: int = 0,
    broken: Collection[int] = (),
) -> SplitLedger:
    """The ledger of a split from the accounts of its label lines and their images `owners`.

    `root` is the dataset folder, `refused` the number of invalid lines, `broken` are the images
    that cannot be decoded. A label file that two images share is counted once.
    """
    with_objects = np.zeros(len(files), bool)
    with_objects[owners[accounts == TRAINED]] = True
    first = {path: number for number, path in reversed(list(enumerate(labels)))}
    counted = np.array([first[path] == i for i, path in enumerate(labels)], bool)
    folders = [source for source in split.images if source.is_dir()]
    folders += [label_path(folder / "x.jpg").parent for folder in folders]
    counts, lost = count_files(
        dict.fromkeys(folders), files, with_objects, broken=broken, labels=labels
    )
    rows = count_rows(accounts[counted[owners]], refused=refused, lost=_count_lines(lost))
    hint = "" if LABELS in counts else _missing_labels(root, files, labels)
    return SplitLedger(counts, rows, len(files), hint)


def _missing_labels(root: Path, images: Sequence[Path], labels: Sequence[Path]) -> str:
    """Where the first label file is expected, and where files of these names are instead."""
    if not labels:
        return ""
    stems = {label.stem for label in labels}
    folders = {image.parent for image in images}
    found = [
        file
        for name in list_files(root).visible
        if name.lower().endswith(".txt") and (file := root / name).name.split(".")[0] in stems
    ]
    found = [file for file in found if not _belongs_elsewhere(file, folders)]
    if found:
        return f"{labels[0]} does not exist, but {len(found)} such file(s): {found[0]}"
    return f"no label file exists; the first is expected to be {labels[0]}"


def _belongs_elsewhere(label: Path, folders: Collection[Path]) -> bool:
    """Whether a label file is where the images of another split have theirs."""
    parts = ["images" if part == "labels" else part for part in label.parent.parts]
    place = Path(*parts)
    return place not in folders and place != label.parent and place.is_dir()


def _count_lines(paths: Iterable[str]) -> int:
    """Lines with text in files of any encoding."""
    return sum(
        bool(line.strip()) for path in paths for line in Path(path).read_bytes().splitlines()
    )


def image_files(split: SplitPaths) -> Iterator[Path]:
    """Image files of a split: of folders (recursive, sorted) or of text files that list them.

    Links to folders are followed; hidden files and folders are left out.
    """
    for source in split.images:
        if source.is_dir():
            paths = (source / name for name in list_files(source).visible)
            yield from sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES)
        elif source.suffix.lower() == ".txt":
            for line in _list_lines(source):
                if line.strip():
                    yield Path(os.path.normpath(source.parent / line.strip()))
        elif source.suffix.lower() in IMAGE_SUFFIXES:
            yield source
        else:
            raise DatasetError(f"{source}: neither a folder of images, nor a list of them (.txt).")


def _unread_images(split: SplitPaths) -> str:
    """A sentence about images of a split in a format that is not read."""
    names = [n for folder in split.images if folder.is_dir() for n in list_files(folder).visible]
    suffixes = [
        suffix for name in names if (suffix := Path(name).suffix.lower()) in UNREAD_SUFFIXES
    ]
    if not suffixes:
        return ""
    return f" {len(suffixes)} file(s) are {suffixes[0]}; {CONVERT.format(suffixes[0])}."


def _list_lines(source: Path) -> list[str]:
    try:
        return split_lines(read_text(source))
    except UnicodeError as error:
        raise DatasetError(f"{source}: the list of images is {error}.") from error
    except OSError as error:
        reason = error.strerror or error
        raise DatasetError(f"{source}: the list of images cannot be read: {reason}.") from error


def label_path(image: Path) -> Path:
    """The label file of an image: the last folder "images" becomes "labels", the suffix .txt."""
    parts = list(image.parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


class LabelFiles:
    """Finds the label files of images; each folder is listed once.

    The suffix may be written .TXT. Where the folder of `label_path` does not exist, label files
    beside the images are read.
    """

    def __init__(self) -> None:
        self._folders: dict[Path, dict[str, str] | None] = {}

    def of(self, image: Path) -> Path:
        """The label file of an image, that of `label_path` if there is none."""
        usual = label_path(image)
        names = self._names(usual.parent)
        if names is None:
            beside = (self._names(image.parent) or {}).get(image.stem)
            return usual if beside is None else image.with_name(beside)
        return usual.with_name(names.get(image.stem, usual.name))

    def _names(self, folder: Path) -> dict[str, str] | None:
        """Names of the text files of a folder by their stem; None if there is no such folder."""
        if folder not in self._folders:
            try:
                found = sorted(entry.name for entry in os.scandir(folder))
            except OSError:
                self._folders[folder] = None
            else:  # .txt sorts after .TXT and wins
                pairs = (os.path.splitext(name) for name in found)  # noqa: PTH122
                texts = {s: s + suffix for s, suffix in pairs if suffix.lower() == ".txt"}
                self._folders[folder] = texts
        return self._folders[folder]
