"""The same scenes as the exports of several tools; each builder returns the folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from tests.datasets import NAMES, Scene, scenes

COUNT = 12
SIZE = (96, 64)


def drawn(folder: Path, names: list[str] | None = None) -> dict[str, Scene]:
    """Write the scenes as PNG files (lossless: their pixels are compared) and return them."""
    folder.mkdir(parents=True)
    names = names or [f"photo {n:02d}.png" for n in range(COUNT)]
    found = dict(zip(names, scenes(len(names), len(NAMES), size=SIZE), strict=True))
    for name, scene in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        scene.image.save(folder / name)
    return found


def voc(root: Path, first: int = 1) -> dict[str, Scene]:
    found = drawn(root / "JPEGImages")
    (root / "Annotations").mkdir()
    for name, scene in found.items():
        items = []
        for shape in scene.shapes:
            x, y, w, h = shape.bbox
            box = (x + first, y + first, x + w, y + h)
            corners = "".join(
                f"<{key}>{value:g}</{key}>"
                for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
            )
            label = escape(NAMES[shape.label])
            items.append(f"<object><name>{label}</name><bndbox>{corners}</bndbox></object>")
        size = "<size><width>96</width><height>64</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}</filename>{size}{''.join(items)}</annotation>"
        (root / "Annotations" / f"{Path(name).stem}.xml").write_text(text)
    return found


def labelme(root: Path) -> dict[str, Scene]:
    found = drawn(root)
    for name, scene in found.items():
        shapes = [
            {
                "label": NAMES[shape.label],
                "points": [list(pair) for pair in pairs(shape.polygon)],
                "shape_type": "polygon",
                "group_id": None,
            }
            for shape in scene.shapes
        ]
        data = {"version": "5.5.0", "shapes": shapes, "imagePath": f"C:\\photos\\{name}"}
        data |= {"imageData": None, "imageWidth": 96, "imageHeight": 64}
        (root / f"{Path(name).stem}.json").write_text(json.dumps(data))
    return found


def cvat(root: Path) -> dict[str, Scene]:
    found = drawn(root / "images")
    rows = []
    for number, (name, scene) in enumerate(found.items()):
        inside = "".join(
            f'<polygon label="{NAMES[s.label]}" '
            f'points="{";".join(f"{x:.2f},{y:.2f}" for x, y in pairs(s.polygon))}"/>'
            for s in scene.shapes
        )
        rows.append(
            f'<image id="{number}" name={quoteattr(name)} width="96" height="64">{inside}</image>'
        )
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES)
    meta = f"<meta><task><labels>{labels}</labels></task></meta>"
    text = f"<annotations><version>1.1</version>{meta}{''.join(rows)}</annotations>"
    (root / "annotations.xml").write_text(text)
    return found


def label_studio(root: Path) -> dict[str, Scene]:
    found = drawn(root / "media")
    tasks = []
    for number, (name, scene) in enumerate(found.items()):
        result = [
            {
                "id": f"r{i}",
                "type": "polygonlabels",
                "original_width": 96,
                "original_height": 64,
                "value": {
                    "points": [[x / 0.96, y / 0.64] for x, y in pairs(shape.polygon)],
                    "polygonlabels": [NAMES[shape.label]],
                },
            }
            for i, shape in enumerate(scene.shapes)
        ]
        image = f"/data/upload/1/0123abcd-{name.replace(' ', '%20')}"
        annotations = [{"result": [], "was_cancelled": True}, {"result": result}]
        tasks.append({"id": number, "data": {"image": image}, "annotations": annotations})
    (root / "project-1.json").write_text(json.dumps(tasks))
    return found


def coco(root: Path, file: str = "annotations/instances_everything.json") -> dict[str, Scene]:
    found = drawn(root / "pictures")
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(coco_document(found)))
    return found


def coco_document(found: dict[str, Scene], first: int = 0) -> dict[str, Any]:
    images, annotations = [], []
    for number, (name, scene) in enumerate(found.items(), first):
        images.append({"id": number, "file_name": name, "width": 96, "height": 64})
        for shape in scene.shapes:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": shape.label * 7,
                    "bbox": shape.bbox,
                    "area": 1,
                    "iscrowd": 0,
                    "segmentation": [shape.polygon],
                }
            )
    categories = [{"id": i * 7, "name": name} for i, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def yolo(root: Path) -> dict[str, Scene]:
    """Label Studio's YOLO export: classes.txt, no data.yaml, no splits."""
    found = drawn(root / "images")
    (root / "labels").mkdir()
    for name, scene in found.items():
        lines = [
            " ".join([str(s.label), *(f"{x / 96:.6f} {y / 64:.6f}" for x, y in pairs(s.polygon))])
            for s in scene.shapes
        ]
        (root / "labels" / f"{Path(name).stem}.txt").write_text("\n".join(lines))
    (root / "classes.txt").write_text("\n".join(NAMES))
    return found


def darknet(root: Path) -> dict[str, Scene]:
    """CVAT's YOLO 1.1: labels beside the images, names in obj.names, boxes only."""
    found = drawn(root / "obj_train_data")
    for name, scene in found.items():
        lines = []
        for s in scene.shapes:
            x, y, w, h = s.bbox
            values = ((x + w / 2) / 96, (y + h / 2) / 64, w / 96, h / 64)
            lines.append(" ".join([str(s.label), *(f"{value:.6f}" for value in values)]))
        (root / "obj_train_data" / f"{Path(name).stem}.txt").write_text("\n".join(lines))
    (root / "obj.names").write_text("\n".join(NAMES))
    (root / "obj.data").write_text("classes = 3\ntrain = data/train.txt\nnames = data/obj.names\n")
    (root / "train.txt").write_text("\n".join(f"data/obj_train_data/{name}" for name in found))
    return found


FORMATS: dict[str, Callable[[Path], dict[str, Scene]]] = {
    "voc": voc,
    "labelme": labelme,
    "cvat": cvat,
    "label-studio": label_studio,
    "coco": coco,
    "yolo": yolo,
    "darknet": darknet,
}
BOXES_ONLY = {"voc", "darknet"}


def pairs(values: list[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2], strict=True))
