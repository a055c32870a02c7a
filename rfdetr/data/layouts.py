"""The layout of a dataset folder: where the images and annotations of each split are.

Recognises COCO exports as Roboflow writes them, plain COCO 2017, and YOLO
(https://docs.ultralytics.com/datasets/detect).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rfdetr.data.data_yaml import class_names, keypoint_values, read_data_yaml
from rfdetr.data.foreign import foreign_hint
from rfdetr.errors import DatasetError

Kind = Literal["roboflow", "coco", "yolo"]
SPLITS = ("train", "val", "test")
FOLDERS = {"train": ("train",), "val": ("valid", "val", "validation"), "test": ("test",)}
YAML_KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
ANNOTATIONS = "_annotations.coco.json"
YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")  # the last ones: FiftyOne


@dataclass(frozen=True)
class SplitPaths:
    """One split: image folders (for YOLO also list files) and, for COCO, the annotation file."""

    name: str
    images: tuple[Path, ...]
    annotations: Path | None = None


@dataclass(frozen=True)
class Layout:
    """A recognised dataset folder.

    `kind` is "roboflow" for a COCO export, "coco" for plain COCO, "yolo" for YOLO. `splits` has
    the existing splits by name. `names` are the class names of a YOLO data.yaml, `keypoint_values`
    the count of numbers that follow the box in a line of pose labels, 0 without `kpt_shape`.
    """

    kind: Kind
    root: Path
    splits: Mapping[str, SplitPaths]
    yaml_file: Path | None = None
    names: tuple[str, ...] = ()
    keypoint_values: int = 0

    def require(self, name: str) -> SplitPaths:
        """The split. Raises DatasetError that says what was expected and what was found."""
        if name in self.splits:
            return self.splits[name]
        raise DatasetError(
            f"{self.root}: no {name!r} split. Expected {_expected(self.kind, name)}. "
            f"{found_in(self.root)}"
        )


def detect_layout(dataset_dir: str | os.PathLike[str], dataset_file: Kind = "roboflow") -> Layout:
    """Recognise the layout of `dataset_dir`.

    "roboflow" is a COCO export (train/_annotations.coco.json) or, failing that, YOLO (data.yaml);
    "coco" and "yolo" accept only that layout. Raises DatasetError that lists what was found.
    """
    root = Path(dataset_dir).expanduser().absolute()
    if not root.is_dir():
        raise DatasetError(
            f"{root}: the dataset folder does not exist. Set dataset_dir to the folder that "
            "contains the splits."
        )
    if dataset_file == "coco":
        return _plain_coco(root)
    if dataset_file == "yolo":
        return _yolo(root)
    if (root / "train" / ANNOTATIONS).is_file():
        return Layout("roboflow", root, dict(exported_splits(root)))
    if _yaml_file(root):
        return _yolo(root)
    raise DatasetError(
        f"{root}: neither a COCO export (train/{ANNOTATIONS}) nor a YOLO dataset (data.yaml or "
        f"data.yml) was found. {found_in(root)} {foreign_hint(root)}"
    )


def found_in(folder: Path, limit: int = 20) -> str:
    """A sentence that lists the entries of a folder and of its subfolders."""
    if not folder.is_dir():
        return f"{folder} does not exist."
    entries = []
    for path in sorted(folder.iterdir())[:limit]:
        if path.is_dir():
            inside = sorted(
                p.name for p in path.iterdir() if p.suffix in (".json", "") or p.is_dir()
            )
            entries.append(f"{path.name}/" + (f" ({', '.join(inside[:4])})" if inside else ""))
        else:
            entries.append(path.name)
    return f"Found in {folder}: {', '.join(entries) or 'nothing'}."


def exported_splits(root: Path) -> Iterable[tuple[str, SplitPaths]]:
    """The splits of a COCO export that have an annotation file."""
    for name, folders in FOLDERS.items():
        for folder in folders:
            annotations = root / folder / ANNOTATIONS
            if annotations.is_file():
                yield name, SplitPaths(name, (root / folder,), annotations)
                break


def _plain_coco(root: Path) -> Layout:
    splits = {}
    for name in SPLITS:
        annotations = root / "annotations" / f"instances_{name}2017.json"
        folders = [root / f"{name}2017", root / "images" / f"{name}2017"]
        images = next((f for f in folders if f.is_dir()), folders[0])
        if annotations.is_file():
            splits[name] = SplitPaths(name, (images,), annotations)
    if not splits:
        raise DatasetError(
            f"{root}: expected {_expected('coco', 'train')}. {found_in(root)} {foreign_hint(root)}"
        )
    return Layout("coco", root, splits)


def _expected(kind: Kind, name: str) -> str:
    if kind == "roboflow":
        return " or ".join(f"{folder}/{ANNOTATIONS}" for folder in FOLDERS[name])
    if kind == "coco":
        return f"annotations/instances_{name}2017.json and the folder {name}2017"
    keys = " or ".join(f"{key}:" for key in YAML_KEYS[name])
    folders = " or ".join(f"{folder}/images" for folder in FOLDERS[name])
    return f"a path {keys} in data.yaml or the folder {folders}"


def _yaml_file(root: Path) -> Path | None:
    return next((root / name for name in YAML_NAMES if (root / name).is_file()), None)


def _yolo(root: Path) -> Layout:
    path = _yaml_file(root)
    if path is None:
        raise DatasetError(
            f"{root}: expected data.yaml or data.yml. {found_in(root)} {foreign_hint(root)}"
        )
    content = read_data_yaml(path)
    problems: list[str] = []
    notes: list[str] = []
    names = class_names(content, problems)
    keypoints = keypoint_values(content, problems)
    splits = yolo_splits(path, content, problems, notes)
    if problems:
        raise DatasetError(f"{path}: " + " ".join(problems))
    if notes:
        warnings.warn(f"{path}: " + " ".join(notes), stacklevel=3)
    return Layout("yolo", root, splits, path, names, keypoints)


def yolo_splits(
    path: Path, content: Mapping[str, Any], problems: list[str], notes: list[str]
) -> dict[str, SplitPaths]:
    """The splits of a data.yaml; adds what is wrong to `problems` and `notes`."""
    found = ((name, _yolo_images(path, content, name, problems, notes)) for name in SPLITS)
    return {name: SplitPaths(name, images) for name, images in found if images}


def _yolo_images(
    path: Path, content: Mapping[str, Any], name: str, problems: list[str], notes: list[str]
) -> tuple[Path, ...]:
    """Image folders or list files of a split: those that data.yaml names, else the usual folders.

    The usual folders are also used, with a note, when no entry of data.yaml exists. Exports often
    name a test folder that they did not write; that is not a problem, there is no test split.
    """
    key = next((key for key in YAML_KEYS[name] if content.get(key)), None)
    usual = _usual_folders(path.parent, name)
    if key is None:
        return usual
    found, missing = _resolve(path, content, key, problems)
    if found or not missing:
        problems += missing
    elif usual:
        notes.append(f"{' '.join(missing)} Using {usual[0]}; correct the path if that is wrong.")
        return usual
    elif name != "test":
        problems += [*missing[:-1], f"{missing[-1]} {found_in(path.parent)}"]
    return found


def _usual_folders(root: Path, name: str) -> tuple[Path, ...]:
    usual = [root / folder / "images" for folder in FOLDERS[name]]
    usual += [root / "images" / folder for folder in FOLDERS[name]]
    return tuple([folder for folder in usual if folder.is_dir()][:1])


def _resolve(
    path: Path, content: Mapping[str, Any], key: str, problems: list[str]
) -> tuple[tuple[Path, ...], list[str]]:
    """Existing paths of the entries of a key, and a sentence for each missing entry."""
    given = content[key] if isinstance(content[key], list) else [content[key]]
    found, missing = [], []
    for entry in given:
        tried = _candidates(path.parent, content.get("path"), str(entry))
        existing = next((place for place in tried if _exists(place)), None)
        if existing is None:
            places = ", ".join(str(place) for place in tried)
            missing.append(f"{key}: {entry} does not exist (tried {places}).")
        elif existing in path.absolute().parent.parents:
            problems.append(f"{key}: {entry} is {existing}, a parent folder of the dataset.")
        else:
            found.append(existing)
    return tuple(found), missing


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # not a valid name on this file system
        return False


def _candidates(folder: Path, base: Any, entry: str) -> list[Path]:
    """Where an entry of data.yaml may point: below `path:`, below the folder of data.yaml, and
    there without leading "../", which Roboflow writes although the splits are beside data.yaml.
    """
    home = os.path.expanduser(str(base))  # noqa: PTH111 - Path.expanduser raises for an unknown user
    bases = [folder / home] if base else []
    bases.append(folder)
    inner = Path(*[part for part in Path(entry).parts if part not in ("..", ".")])
    places = [place / entry for place in bases]
    if not inner.is_absolute():
        places.append(folder / inner)
    return list(dict.fromkeys(Path(os.path.normpath(place)) for place in places))
