"""Chooses the images and objects that the page shows, and counts boxes by size and place.

The choice is random with a fixed seed: the same dataset gives the same page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.checks.check_files import SplitFiles
from rfdetr.checks.samples import BoxMaps, SampleImage, SampleObject, Samples
from rfdetr.data.categories import CategoryTable
from rfdetr.data.ledger import TRAINED

IMAGES = 12  # per split
OBJECTS = 160  # of all classes together
OBJECTS_PER_CLASS = 8
MAX_PIXELS = 100_000_000  # larger images are not drawn: decoding takes seconds and 300 MB
SEED = 0
MAP_SIDE = 32
MAP_BOXES = 100_000  # a map of more is drawn from every second, third ... box


class _Split(NamedTuple):
    """A split, the place of each row's class (-1: none), and which rows and images can be shown."""

    files: SplitFiles
    labels: Integers
    trained: Bools
    shown: Bools  # per image


def draw_samples(
    splits: Sequence[SplitFiles],
    accounts: Sequence[Integers],
    classes: CategoryTable,
    resolution: int,
) -> Samples:
    """Twelve images per split, up to eight objects per class, and the maps of each split.

    `accounts` are those of the ledger for the rows of each split. Boxes must be in pixels.
    """
    rng = np.random.default_rng(SEED)
    order = {label: place for place, label in enumerate(sorted(classes.labels.values()))}
    places = {number: order[label] for number, label in classes.labels.items()}
    names = [classes.class_names[label] for label in order]
    parts = [_split(split, rows, places) for split, rows in zip(splits, accounts, strict=True)]
    return Samples(
        images={part.files.table.name: _images(part, rng) for part in parts},
        objects=_objects(parts, names, rng),
        maps={part.files.table.name: _maps(part, resolution) for part in parts},
    )


def _split(files: SplitFiles, accounts: Integers, places: dict[int, int]) -> _Split:
    table = files.table
    labels = np.array([places.get(c.id, -1) for c in table.categories] + [-1], np.int64)
    shown = np.zeros(len(table.file_names), bool)
    for row, found in files.usable():
        shown[row] = found.facts.width * found.facts.height <= MAX_PIXELS
    return _Split(files, labels[table.category_rows], accounts == TRAINED, shown)


def _images(split: _Split, rng: np.random.Generator) -> list[SampleImage]:
    usable = np.flatnonzero(split.shown)
    chosen = np.sort(rng.choice(usable, min(IMAGES, len(usable)), replace=False))
    owners = split.files.table.image_rows
    rows = np.flatnonzero(np.isin(owners, chosen))
    return [_image(split, row, rows[owners[rows] == row]) for row in chosen.tolist()]


def _image(split: _Split, row: int, annotations: Integers) -> SampleImage:
    files, table = split.files, split.files.table
    path, found = files.paths[row], files.facts[row]
    assert path is not None and found is not None
    return SampleImage(
        split=table.name,
        file=table.show(Path(path)),
        path=Path(path),
        objects=tuple(_object(split, number) for number in annotations.tolist()),
        turned=found.facts.orientation != 1,
    )


def _object(split: _Split, row: int) -> SampleObject:
    table = split.files.table
    category = int(table.category_rows[row])
    x, y, w, h = table.boxes[row].tolist()
    return SampleObject(
        name=table.categories[category].name if category >= 0 else "unknown category",
        label=int(split.labels[row]),
        box=(x, y, w, h),
        outline=table.outline(row),
        trained=bool(split.trained[row]),
    )


def _objects(
    splits: Sequence[_Split], names: Sequence[str], rng: np.random.Generator
) -> dict[str, list[SampleImage]]:
    """Objects of each class in different images; all classes prefer the same few images."""
    if not names or not any(split.shown.any() for split in splits):
        return {}
    each = min(OBJECTS_PER_CLASS, max(1, OBJECTS // len(names)))
    counts = [len(split.shown) for split in splits]
    ranks = np.split(rng.permutation(sum(counts)), np.cumsum(counts)[:-1])
    columns = []
    for number, (split, rank) in enumerate(zip(splits, ranks, strict=True)):
        owners = split.files.table.image_rows
        usable = split.trained & (split.labels >= 0) & np.append(split.shown, False)[owners]
        rows = np.flatnonzero(usable)
        parts = (split.labels[rows], rank[owners[rows]], np.full(len(rows), number), rows)
        columns.append(np.stack(parts))
    label, rank, number, row = np.concatenate(columns, axis=1)
    _, order = np.unique(label * sum(counts) + rank, return_index=True)  # the first row of each
    position = np.arange(len(order)) - np.searchsorted(label[order], label[order])
    found: dict[str, list[SampleImage]] = {}
    for i in order[position < each][:OBJECTS].tolist():
        split, own = splits[number[i]], row[i : i + 1]
        image = int(split.files.table.image_rows[own[0]])
        found.setdefault(names[label[i]], []).append(_image(split, image, own))
    return found


def _maps(split: _Split, resolution: int) -> BoxMaps:
    table = split.files.table
    rows = np.flatnonzero(split.trained)
    rows = rows[:: 1 + len(rows) // MAP_BOXES]
    size, box = table.image_sizes()[rows], table.boxes[rows]
    known = np.isfinite(size).all(axis=1)
    size, box = size[known], box[known]
    sides = np.log2(np.clip(box[:, 2:] * (resolution / size), 1, resolution))
    edges = np.linspace(0, np.log2(resolution), MAP_SIDE + 1)
    sizes, _, _ = np.histogram2d(sides[:, 1], sides[:, 0], bins=(edges, edges))
    corners = np.concatenate([box[:, :2] / size, (box[:, :2] + box[:, 2:]) / size], axis=1)
    return BoxMaps(sizes.astype(np.int64), _places(corners))


def _places(corners: Floats) -> Integers:
    """How many boxes (n, 4) x0, y0, x1, y1 in fractions cover each cell of a grid.

    Each box changes the count at its corners; the sums over rows and columns are the counts.
    """
    cells = corners.clip(0, 1) * MAP_SIDE
    left, top = np.floor(cells[:, :2]).astype(np.int64).T
    right, bottom = np.ceil(cells[:, 2:]).astype(np.int64).T
    changes = np.zeros((MAP_SIDE + 1, MAP_SIDE + 1), np.int64)
    for rows, columns, change in (
        (top, left, 1),
        (top, right, -1),
        (bottom, left, -1),
        (bottom, right, 1),
    ):
        np.add.at(changes, (rows, columns), change)
    covered: Integers = changes.cumsum(axis=0).cumsum(axis=1)[:MAP_SIDE, :MAP_SIDE]
    return covered
