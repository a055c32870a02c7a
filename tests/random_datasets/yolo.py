"""Defects of YOLO label files and of data.yaml."""

from __future__ import annotations

import os
import shutil
from typing import Any

from tests.random_datasets.base import Case
from tests.random_datasets.images import Defect


def _line(text: str) -> Defect:
    """Another text in place of the first label line of an image."""

    def apply(case: Case, split: str, number: int) -> None:
        lines = _lines(case, split, number)
        lines[:1] = [text]

    return apply


def _lines(case: Case, split: str, number: int) -> list[str]:
    names = case.names[split]
    return case.labels[split][names[number % len(names)]]


def _no_labels(case: Case, split: str, number: int) -> None:
    names = case.names[split]
    case.labels[split].pop(names[number % len(names)])
    case.labels[split][names[number % len(names)]] = []


def _none_labelled(case: Case, split: str, _number: int) -> None:
    case.labels[split] = {name: [] for name in case.names[split]}


def _extra_label(case: Case, split: str, _number: int) -> None:
    """A label file without an image."""
    path = case.folder(split).parent / "labels" / "lost.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("0 0.5 0.5 0.2 0.2\n\n")


def _beside(case: Case, split: str, number: int) -> None:
    """A label file beside its image, too."""
    path = case.image(split, number).with_suffix(".txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("0 0.5 0.5 0.2 0.2\n")


def _shared(case: Case, split: str, number: int) -> None:
    """Two images that differ in their suffix only."""
    path = case.image(split, number)
    if path.is_file():
        shutil.copy(path, path.with_suffix(".webp"))


def _suffix(suffix: str) -> Defect:
    return lambda case, _split, _number: setattr(case, "suffix", suffix)


def _encoding(encoding: str) -> Defect:
    def apply(case: Case, split: str, number: int) -> None:
        case.encoding = encoding
        if encoding == "latin-1":
            _lines(case, split, number)[:1] = ["0 0,5 0.5 0.2 0.2 é"]

    return apply


def _yaml(key: str, value: Any) -> Defect:
    def apply(case: Case, _split: str, _number: int) -> None:
        case.content[key] = value

    return apply


def _moved_key(old: str, new: str) -> Defect:
    """A key of data.yaml by another name."""

    def apply(case: Case, _split: str, _number: int) -> None:
        case.content[new] = case.content.pop(old)

    return apply


def _listed(*, absolute: bool = False, repeated: bool = False, lost: bool = False) -> Defect:
    """A text file that lists the images of a split."""

    def apply(case: Case, split: str, _number: int) -> None:
        paths = [case.folder(split) / name for name in case.names[split]]
        lines = [
            str(path) if absolute else f"./{os.path.relpath(path, case.root)}" for path in paths
        ]
        lines += lines[:1] if repeated else []
        lines += ["./train/images/lost.png"] if lost else []
        (case.root / f"{split}.txt").write_text("\n".join(lines) + "\n")
        case.content[split] = f"{split}.txt"

    return apply


LINES = {
    "line-box": "0 0.5 0.5 0.2 0.2",
    "line-class-float": "0.0 0.5 0.5 0.2 0.2",
    "line-class-range": "7 0.5 0.5 0.2 0.2",
    "line-class-negative": "-1 0.5 0.5 0.2 0.2",
    "line-class-name": "a 0.5 0.5 0.2 0.2",
    "line-class-huge": "99999999999999999999 0.5 0.5 0.2 0.2",
    "line-commas": "0,0.5,0.5,0.2,0.2",
    "line-short": "0 0.5 0.5 0.2",
    "line-score": "0 0.5 0.5 0.2 0.2 0.9",
    "line-even": "0 0.1 0.1 0.5 0.1 0.5 0.5 0.9",
    "line-two-points": "0 0.1 0.1 0.5 0.1",
    "line-nan": "0 nan 0.5 0.2 0.2",
    "line-infinite": "0 0.5 0.5 inf 0.2",
    "line-beyond-float": "0 0.5 0.5 1e39 0.2",
    "line-text": "0 0.5 x 0.2 0.2",
    "line-underscore": "0 0_5 0.5 0.2 0.2",
    "line-pixels": "0 12 8 6 4",
    "line-partly-outside": "0 0.95 0.5 0.2 0.2",
    "line-outside": "0 1.5 0.5 0.2 0.2",
    "line-touching": "0 1.1 0.5 0.2 0.2",
    "line-zero": "0 0.5 0.5 0 0.2",
    "line-negative": "0 0.5 0.5 -0.2 0.2",
    "line-thin": "0 0.5 0.5 1e-9 0.2",
    "line-pose": "0 0.5 0.5 0.2 0.2 0.4 0.4 2 0.6 0.6 1",
    "line-crossing": "1 0.1 0.1 0.9 0.9 0.9 0.1 0.1 0.9",
    "line-flat-polygon": "1 0.1 0.1 0.5 0.1 0.9 0.1",
    "line-obb": "0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5",
    "line-comment": "# class x y w h",
    "line-header": "class x_center y_center width height",
    "line-blank": "   ",
    "line-byte": "0 0.5 0.5 0.2 0.2\0",
}
YOLO_DEFECTS: dict[str, Defect] = {
    **{name: _line(text) for name, text in LINES.items()},
    "no-labels": _no_labels,
    "none-labelled": _none_labelled,
    "label-without-image": _extra_label,
    "label-beside": _beside,
    "label-shared": _shared,
    "label-suffix-upper": _suffix(".TXT"),
    "label-suffix-other": _suffix(".label"),
    "labels-utf-16": _encoding("utf-16"),
    "labels-latin-1": _encoding("latin-1"),
    "labels-utf-8-mark": _encoding("utf-8-sig"),
    "names-mapping": _yaml("names", {0: "a", 1: "b"}),
    "names-one": _yaml("names", ["a"]),
    "names-same": _yaml("names", ["a", "a"]),
    "names-empty": _yaml("names", []),
    "names-blank": _yaml("names", ["a", " "]),
    "names-null": _yaml("names", ["a", None]),
    "nc-wrong": _yaml("nc", 9),
    "pose-shape": _yaml("kpt_shape", [2, 3]),
    "path-other": _yaml("path", "/data/project"),
    "path-own": _yaml("path", "."),
    "train-upwards": _yaml("train", "../train/images"),
    "train-lost": _yaml("train", "training/images"),
    "train-list": _yaml("train", ["train/images", "train/images"]),
    "train-same": _yaml("val", "train/images"),
    "train-root": _yaml("train", ".."),
    "val-key": _moved_key("val", "validation"),
    "val-lost": _yaml("val", "nowhere"),
    "test-lost": _yaml("test", "nowhere"),
    "list-relative": _listed(),
    "list-absolute": _listed(absolute=True),
    "list-repeated": _listed(repeated=True),
    "list-lost": _listed(lost=True),
}
