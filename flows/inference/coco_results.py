"""Detections on disk: a progress file that survives kills, and COCO files made from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.core.files import write_json
from flows.inference.images import SourceImage
from rfdetr.files import write_text_atomic

PROGRESS, DATASET, RESULTS = "progress.jsonl", "detections.json", "results.json"
Row = dict[str, Any]


class Progress:
    """`progress.jsonl`: a header, the names of the classes, then one line per finished batch.

    If the header differs (another model or threshold), a new file is started. A truncated last
    line, left by a kill, is dropped, so a batch is recorded completely or not at all. Of a file
    that was damaged, for example by a power failure, the lines before the damage are used.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.file = folder / PROGRESS
        self.categories: dict[int, str] = {}
        self._rows: dict[str, Row] = {}
        content = self.file.read_bytes() if self.file.exists() else b""
        first, *lines = content.split(b"\n")[:-1] or [b""]
        intact = [first] if first == json.dumps(header).encode() else []
        for line in lines if intact else ():
            try:
                self._read(json.loads(line))
            except (ValueError, TypeError, KeyError):
                break
            intact.append(line)
        wanted = b"\n".join([*(intact or [json.dumps(header).encode()]), b""])
        if content != wanted:
            write_text_atomic(self.file, wanted.decode("utf-8"))

    def set_categories(self, names: dict[int, str]) -> None:
        """Record label -> name of every class of the model."""
        if names != self.categories:
            self._append({str(label): name for label, name in names.items()})

    def add(self, rows: Sequence[Row]) -> None:
        """Record a finished batch."""
        self._append(rows)

    def row(self, image: SourceImage) -> Row | None:
        """The recorded result of an image, unless it is new or has changed since."""
        row = self._rows.get(image.name)
        return row if row is not None and row["stamp"] == image.stamp else None

    def rows(self, images: Sequence[SourceImage]) -> list[Row]:
        """The recorded results of the given images."""
        return [row for row in map(self.row, images) if row is not None]

    def _append(self, line: Any) -> None:
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        self._read(line)

    def _read(self, line: Any) -> None:
        if isinstance(line, dict):
            self.categories = {int(label): name for label, name in line.items()}
        else:
            self._rows.update({row["file_name"]: row for row in line})


def write_coco(
    folder: Path, info: dict[str, Any], rows: Sequence[Row], names: dict[int, str]
) -> int:
    """Write the COCO files; returns the number of detections.

    `detections.json` is a COCO dataset with scores, `results.json` the input of pycocotools'
    `loadRes`. Image ids count from 1 in the order of `rows`; `names` gives the categories.
    """
    images: list[Row] = []
    results: list[Row] = []
    categories = dict(names)
    for row in rows:
        if "error" in row:
            continue
        number = len(images) + 1
        images.append({"id": number, **{k: row[k] for k in ("file_name", "width", "height")}})
        categories |= zip(row["labels"], row["names"], strict=True)
        results += _results(number, row)
    unreadable = {row["file_name"]: row["error"] for row in rows if "error" in row}
    document = {
        "info": {**info, "unreadable": unreadable},
        "images": images,
        "annotations": [
            {"id": i, **result, "area": round(result["bbox"][2] * result["bbox"][3], 2)}
            | {"iscrowd": 0}
            for i, result in enumerate(results, start=1)
        ],
        "categories": [{"id": label, "name": categories[label]} for label in sorted(categories)],
    }
    write_json(folder / DATASET, document)
    write_json(folder / RESULTS, results)
    return len(results)


def _results(image: int, row: Row) -> list[Row]:
    found = []
    for i, (x0, y0, x1, y1) in enumerate(row["boxes"]):
        result = {
            "image_id": image,
            "category_id": row["labels"][i],
            "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
            "score": row["scores"][i],
        }
        if "masks" in row:
            size = [row["height"], row["width"]]
            result["segmentation"] = {"size": size, "counts": row["masks"][i]}
        found.append(result)
    return found
