"""Suspected labels of a split as records, as a page with crops, and as proposals in COCO format."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
from PIL import Image, ImageDraw

from flows.config.sections import DatasetSettings
from flows.gate.verdict import Box, SuspectedLabel
from rfdetr.arrays import Floats, Integers
from rfdetr.data.coco import CocoSplits
from rfdetr.data.decode import open_image, to_rgb
from rfdetr.data.layouts import detect_layout
from rfdetr.data.yolo import YoloSplits
from rfdetr.evaluation.box_table import BoxTable, EvaluationData
from rfdetr.evaluation.suspects import KINDS, STRONG, Kind, find_suspects
from rfdetr.files import write_text_atomic

MEANING: dict[Kind, str] = {
    "wrong_class": "the model sees another class",
    "badly_placed": "the model sees the object in another place or size",
    "missing": "the model sees an object without a label",
    "duplicate": "another label of this class is on the same object",
    "spurious": "the model sees nothing here, and it overlooks few objects of this class",
}
_CROP = 220  # pixels
_CONTEXT = 0.6  # of the side of the box, on each side
_LABEL_COLOUR, _PROPOSAL_COLOUR = (0, 150, 60), (215, 40, 40)


class ScoredLabels(Protocol):
    """Labels and detections of a split, such as a `ScoredModel` has them."""

    @property
    def class_names(self) -> list[str]:
        """Names by label."""

    @property
    def columns(self) -> EvaluationData:
        """The labels and detections."""


def suspected_labels(
    scored: ScoredLabels, files: Mapping[int, Path], root: Path, limit: int | None = None
) -> list[SuspectedLabel]:
    """The suspects of a scored split, most suspicious first.

    `files` has the path of every image id; `root` is the dataset's folder.
    """
    root = root.absolute()
    found = find_suspects(scored.columns)
    numbers = _numbers_in_image(scored.columns.truth)
    records = []
    for row in range(len(found) if limit is None else min(limit, len(found))):
        truth = int(found.truth[row])
        number = int(numbers[truth]) if truth >= 0 else None
        image_id = int(scored.columns.image_ids[found.image[row]])
        place = files[image_id]
        name = place.relative_to(root).as_posix() if place.is_relative_to(root) else str(place)
        values = _values(scored, truth, int(found.detection[row]))
        kind, suspicion = KINDS[found.kind[row]], round(float(found.suspicion[row]), 4)
        records.append(
            SuspectedLabel(
                image=name,
                image_id=image_id,
                kind=kind,
                suspicion=suspicion,
                annotation=number,
                **values,
            )
        )
    return records


def _numbers_in_image(truth: BoxTable) -> Integers:
    """The position of every label within its image."""
    order = np.argsort(truth.image, kind="stable")
    grouped = truth.image[order]
    numbers = np.zeros(len(order), dtype=np.int64)
    numbers[order] = np.arange(len(order)) - np.searchsorted(grouped, grouped, side="left")
    return numbers


def _values(scored: ScoredLabels, truth: int, detection: int) -> dict[str, Any]:
    """What the dataset and the model say, from rows of the two tables (-1: nothing)."""
    values: dict[str, Any] = {}
    if truth >= 0:
        table = scored.columns.truth
        values |= {"label": _name(scored, table.label[truth]), "box": _box(table.box[truth])}
    if detection >= 0:
        table = scored.columns.detections
        values |= {"proposal": _name(scored, table.label[detection])}
        values |= {"proposed_box": _box(table.box[detection])}
        values["score"] = round(float(table.score[detection]), 4)
    return values


def _name(scored: ScoredLabels, label: int) -> str:
    names = scored.class_names
    return names[label] if 0 <= label < len(names) and names[label] else str(label)


def _box(box: Floats) -> Box:
    x, y, w, h = (round(float(value), 2) for value in box)
    return x, y, w, h


def image_files(folder: Path, dataset: DatasetSettings, split: str) -> dict[int, Path]:
    """The path of every image of a split (train, valid or test) by its id in the evaluation."""
    layout = detect_layout(folder, dataset.layout)
    splits = YoloSplits(layout) if layout.kind == "yolo" else CocoSplits(layout)
    name = {"valid": "val"}.get(split, split)
    name = name if name in layout.splits else "val"  # as in the evaluation
    index = splits.index(name)
    return {int(number): index.path(i) for i, number in enumerate(index.image_ids)}


def proposals(
    scored: ScoredLabels, suspects: Sequence[SuspectedLabel], files: Mapping[int, Path]
) -> dict[str, Any]:
    """A COCO document of the images with suspects, their labels corrected as proposed.

    Corrected annotations have the `attributes` suspect (kind), suspicion, and was (the class in
    the dataset); labels that should go stay, with the attribute only. CVAT and Label Studio import
    it.
    """
    of_image: dict[int, list[SuspectedLabel]] = {}
    for suspect in suspects:
        of_image.setdefault(suspect.image_id, []).append(suspect)
    truth = scored.columns.truth
    places = {int(number): row for row, number in enumerate(scored.columns.image_ids)}
    images, annotations = [], []
    for image_id, found in of_image.items():
        with Image.open(files[image_id]) as image:
            width, height = image.size
        entry = {"id": image_id, "file_name": found[0].image, "width": width, "height": height}
        images.append(entry)
        changes = {s.annotation: s for s in found if s.annotation is not None}
        rows = np.flatnonzero(truth.image == places[image_id]).tolist()
        for number, row in enumerate(rows):
            name, box = _name(scored, truth.label[row]), _box(truth.box[row])
            crowd = int(truth.crowd[row])
            annotations.append(_annotation(image_id, name, box, changes.get(number), crowd))
        annotations += [
            _annotation(image_id, s.proposal or "", s.proposed_box or (0, 0, 0, 0), s)
            for s in found
            if s.kind == "missing"
        ]
    ids = {name: number for number, name in enumerate(_names(scored), start=1)}
    for number, annotation in enumerate(annotations, start=1):
        annotation |= {"id": number, "category_id": ids[annotation.pop("name")]}
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _names(scored: ScoredLabels) -> list[str]:
    labels = [*range(len(scored.class_names)), *scored.columns.truth.label.tolist()]
    return list(dict.fromkeys(_name(scored, label) for label in labels))


def _annotation(
    image_id: int, name: str, box: Box, suspect: SuspectedLabel | None, crowd: int = 0
) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    if suspect is not None:
        attributes = {"suspect": suspect.kind, "suspicion": suspect.suspicion}
        if suspect.label is not None:
            attributes["was"] = suspect.label
        if suspect.kind == "wrong_class":
            name = suspect.proposal or name
        if suspect.kind == "badly_placed":
            box = suspect.proposed_box or box
    return {
        "image_id": image_id,
        "name": name,
        "bbox": list(box),
        "area": round(box[2] * box[3], 2),
        "iscrowd": crowd,
        "segmentation": [],
        "attributes": attributes,
    }


def write_page(
    target: Path, suspects: Sequence[SuspectedLabel], root: Path, title: str, note: str = ""
) -> None:
    """One HTML file with a crop of every suspect: the label in green, the proposal in red."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flows.gate"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    counts = Counter(suspect.kind for suspect in suspects)
    text = environment.get_template("suspects.html.j2").render(
        title=title,
        note=note,
        counts=[(kind, MEANING[kind], counts[kind]) for kind in KINDS if counts[kind]],
        strong=sum(suspect.suspicion >= STRONG for suspect in suspects),
        cards=list(crops(suspects, root)),
    )
    write_text_atomic(target, text.encode("utf-8", "replace").decode("utf-8"))


def crops(suspects: Sequence[SuspectedLabel], root: Path) -> Iterator[tuple[SuspectedLabel, str]]:
    """Every suspect with its surroundings as a data URL, empty if the image cannot be read."""
    decoded: tuple[str, Image.Image | None] = ("", None)
    for suspect in suspects:
        if decoded[0] != suspect.image:
            decoded = (suspect.image, _read(root / suspect.image))
        yield suspect, "" if decoded[1] is None else _crop(decoded[1], suspect)


def _read(path: Path) -> Image.Image | None:
    try:
        with open_image(path.read_bytes()) as image:
            return to_rgb(image).copy()
    except (OSError, ValueError):
        return None


def _crop(image: Image.Image, suspect: SuspectedLabel) -> str:
    """The surroundings of both boxes as a data URL."""
    boxes = np.array([b for b in (suspect.box, suspect.proposed_box) if b is not None])
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])
    low, high = corners.min(axis=0), corners.max(axis=0)
    margin = max(8.0, _CONTEXT * float((high - low).max()))
    left, top = (max(0, int(value - margin)) for value in low)
    right = max(left + 1, min(image.width, int(high[0] + margin)))
    bottom = max(top + 1, min(image.height, int(high[1] + margin)))
    scale = _CROP / max(right - left, bottom - top)
    size = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    crop = image.crop((left, top, right, bottom)).resize(size)
    draw = ImageDraw.Draw(crop)
    for box, colour in ((suspect.box, _LABEL_COLOUR), (suspect.proposed_box, _PROPOSAL_COLOUR)):
        if box is not None:
            x, y = (box[0] - left) * scale, (box[1] - top) * scale
            draw.rectangle(
                (x, y, x + max(1, box[2] * scale), y + max(1, box[3] * scale)),
                outline=colour,
                width=2,
            )
    stream = io.BytesIO()
    crop.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
