"""A clean dataset on disk in any layout, open for defects before its documents are written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

Kind = Literal["roboflow", "coco", "yolo"]
WIDTH, HEIGHT = 24, 16
COUNTS = {"train": 4, "val": 2, "test": 1}
FOLDERS = {
    "roboflow": {"train": "train", "val": "valid", "test": "test"},
    "coco": {"train": "train2017", "val": "val2017"},
    "yolo": {"train": "train/images", "val": "valid/images", "test": "test/images"},
}
BOXES = ([2, 2, 8, 6], [12, 5, 10, 9])  # x, y, width, height


def noise(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """An RGB image that looks like no other one."""
    levels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


@dataclass
class Case:
    """A dataset that is being built.

    `documents` are the annotation files of a COCO layout, `labels` the lines of a YOLO layout by
    split and image name, `content` is data.yaml. `names` are the image names of each split.
    """

    root: Path
    kind: Kind
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    content: dict[str, Any] = field(default_factory=dict)
    suffix: str = ".txt"
    encoding: str = "utf-8"

    @property
    def splits(self) -> list[str]:
        return list(FOLDERS[self.kind])

    def folder(self, split: str) -> Path:
        """The images of a split."""
        return self.root / FOLDERS[self.kind][split]

    def image(self, split: str, number: int) -> Path:
        return self.folder(split) / self.names[split][number % len(self.names[split])]

    def record(self, split: str, number: int) -> dict[str, Any]:
        """An image record of a COCO layout."""
        images: list[dict[str, Any]] = self.documents[split]["images"]
        return images[number % len(images)]

    def row(self, split: str, number: int) -> dict[str, Any]:
        """An annotation of a COCO layout."""
        rows: list[dict[str, Any]] = self.documents[split]["annotations"]
        return rows[number % len(rows)]

    def rename(self, split: str, number: int, name: str, *, listed: str | None = None) -> None:
        """Give an image another name, which its record or its label file follows."""
        old = self.names[split][number % len(self.names[split])]
        place = self.folder(split) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (self.folder(split) / old).is_file() and not place.exists():
            (self.folder(split) / old).rename(place)
        self.names[split][number % len(self.names[split])] = name
        for image in self.documents.get(split, {}).get("images", ()):
            if image.get("file_name") == old:
                image["file_name"] = name if listed is None else listed
        if split in self.labels:
            self.labels[split][name] = self.labels[split].pop(old)

    def write(self) -> None:
        """Write the annotation files."""
        for split, document in self.documents.items():
            text = json.dumps(document, ensure_ascii=self.encoding == "utf-8")
            self.annotation_file(split).parent.mkdir(exist_ok=True)
            self.annotation_file(split).write_bytes(text.encode(self.encoding, "replace"))
        for split, labels in self.labels.items():
            for name, lines in labels.items():
                path = self.label_file(split, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes("\n".join(lines).encode(self.encoding, "replace"))
        if self.kind == "yolo":
            (self.root / "data.yaml").write_text(json.dumps(self.content))

    def annotation_file(self, split: str) -> Path:
        if self.kind == "coco":
            return self.root / "annotations" / f"instances_{split}2017.json"
        return self.folder(split) / "_annotations.coco.json"

    def label_file(self, split: str, name: str) -> Path:
        return (self.folder(split).parent / "labels" / name).with_suffix(self.suffix)


def clean(root: Path, kind: Kind) -> Case:
    """A dataset without a finding worth a warning."""
    case = Case(root, kind)
    for place, split in enumerate(case.splits):
        case.folder(split).mkdir(parents=True)
        case.names[split] = [f"{split}{number}.png" for number in range(COUNTS[split])]
        for number, name in enumerate(case.names[split]):
            noise(10 * place + number).save(case.folder(split) / name)
        if kind == "yolo":
            case.labels[split] = {name: _lines() for name in case.names[split]}
        else:
            case.documents[split] = _document(case.names[split])
    if kind == "yolo":
        case.content = {"train": "train/images", "val": "valid/images", "names": ["a", "b"]}
    return case


def _document(names: list[str]) -> dict[str, Any]:
    images = [
        {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
        for number, name in enumerate(names, 1)
    ]
    rows = [
        {
            "id": 2 * number + place + 1,
            "image_id": number + 1,
            "category_id": place + 1,
            "bbox": list(box),
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [corners(box)],
        }
        for number in range(len(names))
        for place, box in enumerate(BOXES)
    ]
    categories = [{"id": number, "name": name} for number, name in ((1, "a"), (2, "b"))]
    return {"images": images, "annotations": rows, "categories": categories}


def corners(box: list[int]) -> list[float]:
    """A box as a polygon."""
    x, y, w, h = map(float, box)
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def _lines() -> list[str]:
    """Two polygons, which a detection model reads as boxes."""
    size = (WIDTH, HEIGHT)
    return [
        " ".join(
            [str(place), *(f"{value / size[i % 2]:.6f}" for i, value in enumerate(corners(box)))]
        )
        for place, box in enumerate(BOXES)
    ]
