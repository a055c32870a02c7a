"""Puts label files of a YOLO copy where they are read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from rfdetr.data.folders import fold
from rfdetr.data.layouts import Layout
from rfdetr.data.yolo import LabelFiles, label_path
from rfdetr.data.yolo_labels import read_labels


def place_labels(
    work: Path, layout: Layout, images: Sequence[Path], lists: Collection[Path]
) -> int:
    """Move the only label file with the name of an image, such as a.txt or a.jpg.txt, to where it
    is read. `lists` are text files that list images.
    """
    lost: dict[str, list[Path]] = defaultdict(list)
    read = labels_read(images)
    beside = {label.parent for image, label in read.items() if label.parent == image.parent}
    for image in images:
        if image.is_relative_to(work) and image not in read:
            for key in {_plain(image.stem), _plain(image.name)}:
                lost[key].append(image)
    if not lost:
        return 0
    used = {*read.values(), *lists}
    spare: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(work.rglob("*")):
        if file.suffix.lower() == ".txt" and _plain(file.stem) in lost and file not in used:
            spare[_plain(file.stem)].append(file)
    count = 0
    for stem, files in spare.items():
        owners = lost[stem]
        rows, problems = read_labels(files[0], len(layout.names))
        if len(files) == len(owners) == 1 and rows and not problems:
            image = owners[0]
            place = image.with_suffix(".txt") if image.parent in beside else label_path(image)
            place.parent.mkdir(parents=True, exist_ok=True)
            files[0].rename(place)
            count += 1
    return count


def labels_read(images: Iterable[Path]) -> dict[Path, Path]:
    """The label files that are read, by image."""
    files = LabelFiles()
    return {image: label for image in images if (label := files.of(image)).is_file()}


def _plain(name: str) -> str:
    """A name as tools compare it that replace spaces."""
    return re.sub(r"[\s_-]+", "_", fold(name))
