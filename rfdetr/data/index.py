"""Annotations of one split in a few arrays that loader workers share instead of copying.

A forked worker shares the memory pages; a spawned one receives the arrays (40 bytes per
annotation) and reopens the annotation file for polygons. There is no Python object per annotation,
whose reference count would make forked workers copy every page.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from rfdetr.arrays import Integers
from rfdetr.data.coco_annotations import parse_segmentation
from rfdetr.data.ledger import SplitLedger
from rfdetr.errors import DatasetError

SHOWN = 20


class PackedStrings(Sequence[str]):
    """Strings in one byte array."""

    def __init__(self, strings: Iterable[str]) -> None:
        parts = [text.encode("utf-8", "surrogateescape") for text in strings]
        lengths = np.fromiter(map(len, parts), np.int64, len(parts))
        self._stops = np.cumsum(lengths)
        self._bytes = np.frombuffer(b"".join(parts), np.uint8)

    def __len__(self) -> int:
        return len(self._stops)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start = self._stops[number - 1] if number else 0
        text = self._bytes[start : self._stops[number]].tobytes()
        return text.decode("utf-8", "surrogateescape")


@dataclass
class FileOutlines:
    """Segmentations that stay in the annotation file and are read by position when needed.

    Costs no memory per polygon. Raises DatasetError if the file changed since it was indexed.
    """

    path: Path
    size: int
    changed_ns: int
    starts: Integers
    stops: Integers
    _file: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, path: Path, starts: Integers, stops: Integers) -> Self:
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns, starts, stops)

    def __getitem__(self, row: int) -> Any:
        """Polygons (list of lists of pixels), RLE (dict), or None."""
        length = int(self.stops[row] - self.starts[row])
        if not length:
            return None
        stream = self._open()
        stream.seek(int(self.starts[row]))
        return parse_segmentation(stream.read(length))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _open(self) -> Any:
        if (
            self._file is None or self._file[0] != os.getpid()
        ):  # forked processes share a file position
            stream = open(self.path, "rb")  # noqa: SIM115 - stays open as long as the worker
            status = os.fstat(stream.fileno())
            if (status.st_size, status.st_mtime_ns) != (self.size, self.changed_ns):
                stream.close()
                raise DatasetError(
                    f"{self.path}: the annotation file changed while it was in use. "
                    "Restart the run."
                )
            self._file = (os.getpid(), stream)
        return self._file[1]


@dataclass(frozen=True)
class PolygonOutlines:
    """One polygon per row in fractions of the image; empty where the row is a plain box."""

    values: npt.NDArray[np.float32]
    starts: Integers
    stops: Integers

    def __getitem__(self, row: int) -> npt.NDArray[np.float32]:
        """Corner points (n, 2)."""
        return self.values[self.starts[row] : self.stops[row]].reshape(-1, 2)


@dataclass(frozen=True)
class AnnotationIndex:
    """One split: images 0..n-1 and, for image i, the annotation rows first[i]..first[i + 1] - 1.

    Rows keep the order of the annotation file. `boxes` (m, 4) are x0, y0, x1, y1, not clipped:
    float32 pixels, or float64 fractions of the image if `relative`. `areas` are in pixels.
    """

    root: Path
    names: PackedStrings  # image files, relative to root or absolute
    image_ids: Integers
    first: Integers
    boxes: npt.NDArray[Any]
    labels: Integers
    areas: npt.NDArray[np.float32] | None  # None: use the areas of the boxes
    crowd: npt.NDArray[np.bool_]
    class_names: tuple[str, ...]
    num_classes: int
    relative: bool = False
    outlines: FileOutlines | PolygonOutlines | None = None
    masked: npt.NDArray[np.bool_] | None = None  # rows with an outline, if outlines are read
    ledger: SplitLedger = field(default_factory=SplitLedger)

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, image: int) -> Path:
        """The image file."""
        return self.root / str(self.names[image])

    def paths(self) -> Iterator[str]:
        """The image files in order, as text: a Path object per image costs more."""
        return (os.path.join(self.root, name) for name in self.names)  # noqa: PTH118

    def rows(self, image: int) -> Integers:
        """Annotation rows of an image."""
        return np.arange(self.first[image], self.first[image + 1])

    def pixel_boxes(self, rows: Integers, width: int, height: int) -> npt.NDArray[np.float32]:
        """Boxes (n, 4) x0 y0 x1 y1 in pixels, not clipped."""
        boxes = self.boxes[rows]
        if self.relative:
            boxes = boxes * np.array([width, height, width, height])
        return boxes.astype(np.float32)


def missing_files(root: Path, names: Iterable[str]) -> Iterator[str]:
    """Names without a file below `root`; lists each folder once instead of testing each file."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_folder[os.path.dirname(name)].append(name)  # noqa: PTH120 - a million names
    for folder, inside in by_folder.items():
        try:
            present = {entry.name for entry in os.scandir(root / folder) if entry.is_file()}
        except OSError:
            present = set()
        for name in inside:
            if os.path.basename(name) not in present and not (root / name).is_file():  # noqa: PTH119
                yield name


def raise_problems(place: Path, problems: Sequence[str], advice: str) -> None:
    """Raise one DatasetError for all problems; nothing when there are none."""
    if problems:
        shown = "\n  ".join(problems[:SHOWN])
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DatasetError(f"{place}: {len(problems)} problem(s):\n  {shown}{more}\n{advice}")
