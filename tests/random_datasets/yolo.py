"""Defects of YOLO label files and of data.yaml."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
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


def _place(case: Case, split: str, number: int) -> Path:
    names = case.names[split]
    name = names[number % len(names)]
    case.labels[split].pop(name)
    path = case.label_file(split, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _label_folder(case: Case, split: str, number: int) -> None:
    """A folder with the name of a label file."""
    _place(case, split, number).mkdir()


def _label_dangling(case: Case, split: str, number: int) -> None:
    _place(case, split, number).symlink_to(case.root / "nowhere.txt")


def _labels_linked(case: Case, split: str, _number: int) -> None:
    """The labels folder is a link to a folder elsewhere."""
    elsewhere = case.root.parent / "elsewhere" / split / "labels"
    elsewhere.mkdir(parents=True)
    (case.folder(split).parent / "labels").symlink_to(elsewhere, target_is_directory=True)


def _classes_file(case: Case, split: str, _number: int) -> None:
    (case.folder(split) / "classes.txt").write_text("a\nb\n")


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
    "label-folder": _label_folder,
    "label-dangling": _label_dangling,
    "labels-linked": _labels_linked,
    "classes-file": _classes_file,
    "label-shared": _shared,
    "label-suffix-upper": _suffix(".TXT"),
    "label-suffix-other": _suffix(".label"),
    "line-plus": _line("+0 0.5 0.5 0.2 0.2"),
    "line-exponent": _line("0 5e-1 5E-1 0.2 0.2"),
    "line-tabs": _line("0\t0.5\t0.5\t0.2\t0.2"),
    "line-other-digits": _line("\u0660 0.5 0.5 0.2 0.2"),
    "line-no-break-space": _line("0\u00a00.5 0.5 0.2 0.2"),
    "line-form-feed": _line("0 0.5 0.5 0.2 0.2\f0 0.5 0.5 0.2 0.2"),
    "line-line-separator": _line("0 0.5 0.5 0.2 0.2\u20280 0.4 0.4 0.2 0.2"),
    "line-carriage-return": _line("0 0.5 0.5 0.2 0.2\r0 0.4 0.4 0.2 0.2"),
    "line-millionth": _line("0 0.5 0.5 0.000001 0.2"),
    "line-edge": _line("0 0 0.5 0.000002 0.2"),
    "line-beyond": _line("0 1e300 0.5 0.2 0.2"),
    "labels-utf-16": _encoding("utf-16"),
    "labels-latin-1": _encoding("latin-1"),
    "labels-utf-8-mark": _encoding("utf-8-sig"),
    "names-mapping": _yaml("names", {0: "a", 1: "b"}),
    "names-one": _yaml("names", ["a"]),
    "names-same": _yaml("names", ["a", "a"]),
    "names-empty": _yaml("names", []),
    "names-blank": _yaml("names", ["a", " "]),
    "names-text-keys": _yaml("names", {"0": "a", "1": "b"}),
    "names-gap": _yaml("names", {0: "a", 2: "b"}),
    "names-text": _yaml("names", "a, b"),
    "names-nested": _yaml("names", [["a"], "b"]),
    "names-number": _yaml("names", [1, 2]),
    "nc-text": _yaml("nc", "2"),
    "nc-zero": _yaml("nc", 0),
    "pose-shape-text": _yaml("kpt_shape", "17, 3"),
    "path-number": _yaml("path", 5),
    "train-number": _yaml("train", 5),
    "train-object": _yaml("train", {"a": "train/images"}),
    "train-image": _yaml("train", "train/images/train0.png"),
    "train-yaml": _yaml("train", "data.yaml"),
    "train-null-byte": _yaml("train", "tr\0ain"),
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
