"""YOLO label files to an AnnotationIndex.

Format: https://docs.ultralytics.com/datasets/detect and .../segment.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from rfdetr.arrays import Integers
from rfdetr.data.decode import IMAGE_SUFFIXES
from rfdetr.data.folders import list_files
from rfdetr.data.index import AnnotationIndex, PackedStrings, PolygonOutlines, raise_problems
from rfdetr.data.layouts import Layout, SplitPaths
from rfdetr.data.ledger import TRAINED, SplitLedger, count_files, count_rows, row_accounts
from rfdetr.errors import DatasetError


class LabelRow(NamedTuple):
    """One line: class, box x0 y0 x1 y1, polygon x y x y ... (empty for a box), as fractions."""

    label: int
    box: tuple[float, float, float, float]
    polygon: list[float]
    line: int


POSE_HINT = "pose labels need kpt_shape: [keypoints, 2 or 3] in data.yaml"
# What is wrong with a line; the dataset checks report findings under the same codes.
LineCode = Literal["label-line-malformed", "label-class-range", "box-non-numeric", "box-nan"]


class LabelProblem(NamedTuple):
    """An invalid line."""

    line: int
    text: str
    reason: str
    code: LineCode = "label-line-malformed"

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason} (found {self.text!r})"


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
        files = list(image_files(split))
        if not files and name != "test":
            places = ", ".join(map(str, split.images))
            raise DatasetError(
                f"{places}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) for {name!r}."
            )
        listed = [file for file in files if not file.is_file()]
        raise_problems(root, [f"image {f} does not exist" for f in listed], "Fix the list files.")
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
        return self._arrays(files, rows, first, self._ledger(split, files, paths, rows, first))

    @staticmethod
    def _ledger(
        split: SplitPaths,
        files: Sequence[Path],
        labels: Sequence[Path],
        rows: Sequence[LabelRow],
        first: Sequence[int],
    ) -> SplitLedger:
        owners = np.repeat(np.arange(len(files)), np.diff(first))
        boxes = np.array([row.box for row in rows], np.float64).reshape(-1, 4)
        return yolo_ledger(split, files, labels, boxes, owners)

    def _arrays(
        self,
        files: list[Path],
        rows: list[LabelRow],
        first: list[int],
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
            first=np.array(first, np.int64),
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


def yolo_ledger(
    split: SplitPaths,
    files: Sequence[Path],
    labels: Sequence[Path],
    boxes: npt.NDArray[np.float64],
    owners: Integers,
    *,
    refused: int = 0,
    broken: Collection[int] = (),
) -> SplitLedger:
    """The ledger of a split from its label lines.

    `boxes` (n, 4) are x0, y0, x1, y1 in fractions, `owners` their images, `refused` the number of
    invalid lines, `broken` the images that cannot be decoded. A label file that two images share
    is counted once.
    """
    accounts = row_accounts(boxes, np.ones((len(boxes), 2)), np.zeros(len(boxes), bool), owners)
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
    return SplitLedger(counts, rows)


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
            for line in source.read_text(encoding="utf-8-sig").splitlines():
                if line.strip():
                    yield Path(os.path.normpath(source.parent / line.strip()))
        else:
            yield source


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


def read_labels(
    path: Path, classes: int, keypoint_values: int = 0
) -> tuple[list[LabelRow], list[LabelProblem]]:
    """The valid lines of a label file and the problems of the others; a missing file is empty.

    `keypoint_values` are the numbers that follow the box in pose labels; they are not used.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return [], []
    except UnicodeDecodeError as error:
        return [], [LabelProblem(1, "", f"the file is not UTF-8 text: {error.reason}")]
    except OSError as error:
        return [], [LabelProblem(1, "", f"the file cannot be read: {error.strerror or error}")]
    rows, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(parse_line(line, classes, number, keypoint_values))
            except LineError as error:
                problem = LabelProblem(number, line.strip()[:80], str(error), error.code)
                problems.append(problem)
    return rows, problems


class LineError(DatasetError):
    """An invalid label line, with the reason."""

    def __init__(self, reason: str, code: LineCode = "label-line-malformed") -> None:
        super().__init__(reason)
        self.code = code


def parse_line(line: str, classes: int, number: int = 1, keypoint_values: int = 0) -> LabelRow:
    """Parse one label line, as `read_labels`. Raises LineError with the reason."""
    words = line.split()
    if keypoint_values:
        if len(words) not in (5, 5 + keypoint_values):
            raise LineError(
                f"{len(words)} numbers; with kpt_shape: in data.yaml a line has 5, or "
                f"{5 + keypoint_values} with keypoints"
            )
        _floats(words[5:])
        words = words[:5]
    elif len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        hint = f" (keypoints? {POSE_HINT})" if len(words) > 5 and (len(words) - 5) % 3 == 0 else ""
        raise LineError(f"{len(words)} numbers; expected 5, or an odd count of at least 7{hint}")
    label = _class_number(words[0])
    if not 0 <= label < classes:
        raise LineError(f"the class {label} is not in 0..{classes - 1}", "label-class-range")
    values = _floats(words[1:])
    if len(values) > 4 and (len(values) - 4) % 3 == 0:
        visibility = set(values[6::3])
        if 2.0 in visibility and visibility <= {0.0, 1.0, 2.0}:
            raise LineError(f"the line has a box and keypoints with visibility; {POSE_HINT}")
    if len(values) == 4:
        cx, cy, w, h = values
        return LabelRow(label, (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), [], number)
    xs, ys = values[::2], values[1::2]
    return LabelRow(label, (min(xs), min(ys), max(xs), max(ys)), values, number)


def _floats(words: Sequence[str]) -> list[float]:
    try:
        values = [_number(word) for word in words]
    except ValueError:
        raise LineError("not all values are numbers", "box-non-numeric") from None
    if not all(map(math.isfinite, values)):
        raise LineError("not all values are finite", "box-nan")
    return values


def _class_number(word: str) -> int:
    """An integer in ASCII digits; int() would also accept 1_0, +1 and digits of other scripts."""
    if not re.fullmatch("-?[0-9]{1,18}", word):
        raise LineError(f"the class {word!r} is not an integer")
    return int(word)


def _number(word: str) -> float:
    """A number in ASCII without "_"; float() would accept more."""
    if "_" in word or not word.isascii():
        raise ValueError
    return float(word)
