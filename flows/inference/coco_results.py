"""Detections on disk: a progress file that survives any kill, and the COCO files made of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flows.core.files import write_json
from flows.inference.images import Picture
from rfdetr.files import write_text_atomic

PROGRESS, DATASET, RESULTS = "progress.jsonl", "detections.json", "results.json"
Row = dict[str, Any]


class Progress:
    """`progress.jsonl`: a header, then one line per finished batch.

    A header that differs (another model or threshold) starts a new file. A torn last line, left
    by a kill, counts as not done; so batches are always whole.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.file, self.header = folder / PROGRESS, header
        self._rows: dict[str, Row] = {}
        lines = self.file.read_text(encoding="utf-8").split("\n") if self.file.exists() else [""]
        whole = lines[:-1]
        if not whole or json.loads(whole[0]) != header:
            whole = [json.dumps(header)]
        if lines != [*whole, ""]:
            write_text_atomic(self.file, "\n".join(whole) + "\n")
        for line in whole[1:]:
            self._take(json.loads(line))

    def add(self, rows: Sequence[Row]) -> None:
        """Write a finished batch down."""
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(rows) + "\n")
        self._take(rows)

    def row(self, picture: Picture) -> Row | None:
        """What was found on an image, unless it is new or has changed since."""
        row = self._rows.get(picture.name)
        return row if row is not None and row["stamp"] == picture.stamp else None

    def _take(self, rows: Sequence[Row]) -> None:
        self._rows.update({row["file_name"]: row for row in rows})


def write_coco(folder: Path, info: dict[str, Any], rows: Sequence[Row]) -> int:
    """Write `detections.json`, a COCO dataset with scores, and `results.json`, what COCO's
    `loadRes` reads; image ids count from 1 in the order of `rows`. The number of detections.
    """
    images: list[Row] = []
    results: list[Row] = []
    categories: dict[int, str] = {}
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
