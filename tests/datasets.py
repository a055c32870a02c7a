"""Tiny datasets on disk for tests: coloured shapes on noise, in every layout that we read.

Every builder takes the same options: `splits` (name -> number of images), `names` of the classes,
`size` (width, height), `seed`, `background` (every n-th image has no object, 0 = none) and returns
the folder. Class i is drawn in its own colour, so that a small model can learn it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

NAMES = ("washer", "bolt", "nut")
SPLITS = {"train": 6, "valid": 3, "test": 2}
COLOURS = ((230, 40, 40), (40, 200, 60), (50, 80, 240), (240, 220, 50), (200, 60, 220))


class Shape(NamedTuple):
    label: int
    polygon: list[float]  # x, y, x, y ... in pixels

    @property
    def bbox(self) -> list[float]:
        xs, ys = self.polygon[::2], self.polygon[1::2]
        return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


class Scene(NamedTuple):
    image: Image.Image
    shapes: list[Shape]


def scenes(
    count: int,
    classes: int,
    *,
    size: tuple[int, int] = (96, 64),
    seed: int = 0,
    background: int = 5,
) -> Iterator[Scene]:
    """`count` images with one to three diamonds or rectangles each."""
    width, height = size
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        noise = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        shapes = []
        empty = background and number % background == background - 1
        for _ in range(0 if empty else int(rng.integers(1, 4))):
            label = int(rng.integers(classes))
            w, h = (int(rng.integers(side // 5, side // 2)) for side in size)
            x, y = int(rng.integers(width - w)), int(rng.integers(height - h))
            if rng.random() < 0.5:
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            else:
                corners = [x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h / 2]
            shapes.append(Shape(label, [float(v) for v in corners]))
            ImageDraw.Draw(image).polygon(corners, fill=COLOURS[label % len(COLOURS)])
        yield Scene(image, shapes)


def coco_document(
    folder: Path, found: Iterator[Scene], names: Sequence[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the images of `found` to `folder` and return their COCO document."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, scene in enumerate(found):
        name = f"image_{number:04d}.{options.get('suffix', 'jpg')}"
        scene.image.save(folder / name)
        width, height = scene.image.size
        images.append({"id": number + 1, "file_name": name, "width": width, "height": height})
        for shape in scene.shapes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": shape.label + options["first_id"],
                    "bbox": shape.bbox,
                    "area": shape.bbox[2] * shape.bbox[3],
                    "segmentation": [shape.polygon] if options.get("segmentation") else [],
                    "iscrowd": 0,
                }
            )
        if options.get("crowd") and scene.shapes:
            crowd = {"size": [height, width], "counts": [5, 20 * height, height * width]}
            crowd["counts"][2] -= sum(crowd["counts"][:2])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": scene.shapes[0].label + options["first_id"],
                    "bbox": [0, 0, 21, height],
                    "area": 20 * height,
                    "segmentation": crowd,
                    "iscrowd": 1,
                }
            )
    categories = [
        {"id": i + options["first_id"], "name": name, "supercategory": options["parent"]}
        for i, name in enumerate(names)
    ]
    if options["parent"] != "none":
        root = {"id": 0, "name": options["parent"], "supercategory": "none"}
        categories.insert(0, root)
    return {"images": images, "annotations": annotations, "categories": categories}


def make_roboflow(
    root: Path,
    *,
    splits: Mapping[str, int] | None = None,
    names: Sequence[str] = NAMES,
    parent: str = "none",
    segmentation: bool = False,
    crowd: bool = False,
    suffix: str = "jpg",
    **scene_options: Any,
) -> Path:
    """Roboflow's COCO export. `parent` other than "none" adds the ghost category 0 of that name."""
    seed = scene_options.pop("seed", 0)
    options = {
        "segmentation": segmentation,
        "crowd": crowd,
        "parent": parent,
        "first_id": 0 if parent == "none" else 1,
        "suffix": suffix,
    }
    for number, (split, count) in enumerate((splits or SPLITS).items()):
        drawn = scenes(count, len(names), seed=seed * 10 + number, **scene_options)
        document = coco_document(root / split, drawn, names, options)
        (root / split / "_annotations.coco.json").write_text(json.dumps(document))
    return root


def make_coco(
    root: Path,
    *,
    splits: Mapping[str, int] | None = None,
    names: Sequence[str] = NAMES,
    segmentation: bool = False,
    crowd: bool = False,
    first_id: int = 1,
    **scene_options: Any,
) -> Path:
    """Plain COCO: train2017, val2017 and annotations/instances_*.json."""
    seed = scene_options.pop("seed", 0)
    options = {"segmentation": segmentation, "crowd": crowd, "parent": "none", "first_id": first_id}
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate((splits or {"train": 6, "val": 3}).items()):
        drawn = scenes(count, len(names), seed=seed * 10 + number, **scene_options)
        document = coco_document(root / f"{split}2017", drawn, names, options)
        path = root / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(document))
    return root


def make_yolo(
    root: Path,
    *,
    splits: Mapping[str, int] | None = None,
    names: Sequence[str] = NAMES,
    polygons: bool = False,
    yaml_name: str = "data.yaml",
    yaml_text: str | None = None,
    suffix: str = "png",
    **scene_options: Any,
) -> Path:
    """YOLO: <split>/images, <split>/labels and data.yaml with train/val/test paths."""
    seed = scene_options.pop("seed", 0)
    chosen = splits or SPLITS
    for number, (split, count) in enumerate(chosen.items()):
        images, labels = root / split / "images", root / split / "labels"
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        drawn = scenes(count, len(names), seed=seed * 10 + number, **scene_options)
        for i, scene in enumerate(drawn):
            scene.image.save(images / f"image_{i:04d}.{suffix}")
            lines = [_yolo_line(shape, scene.image.size, polygons) for shape in scene.shapes]
            if lines:
                (labels / f"image_{i:04d}.txt").write_text("\n".join(lines) + "\n")
    keys = {"train": "train", "valid": "val", "val": "val", "test": "test"}
    paths = "".join(f"{keys.get(split, split)}: {split}/images\n" for split in chosen)
    text = yaml_text or f"{paths}nc: {len(names)}\nnames: {json.dumps(list(names))}\n"
    (root / yaml_name).write_text(text)
    return root


def _yolo_line(shape: Shape, size: tuple[int, int], polygons: bool) -> str:
    width, height = size
    if polygons:
        values = [v / (height if i % 2 else width) for i, v in enumerate(shape.polygon)]
    else:
        x, y, w, h = shape.bbox
        values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
    return " ".join([str(shape.label), *(f"{v:.6f}" for v in values)])
