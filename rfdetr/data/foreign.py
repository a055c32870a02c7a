"""Names the annotation format of a folder that has no layout which training reads."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree.ElementTree import ParseError

import msgspec
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import iterparse

from rfdetr.data.data_yaml import read_data_yaml
from rfdetr.data.folders import list_files
from rfdetr.errors import DatasetError

EXPORT = "_annotations.coco.json"
SAMPLES = 20  # files of one kind that are opened to recognise a format
# The keys of a JSON object by which a format is recognised.
JSON_KEYS = {
    "coco": {"images", "annotations", "categories"},
    "labelme": {"shapes"},
    "datumaro": {"items", "categories"},
    "via": {"_via_img_metadata"},
    "fiftyone": {"samples"},
    "supervisely": {"objects", "size"},
    "label-studio": {"data", "annotations"},  # one task
}
XML_TAGS = {"annotation": "voc", "annotations": "cvat"}
# Formats that `rfdetr-pipeline import` reads, and those that it does not.
IMPORTED = {
    "coco": "COCO annotations in other folders",
    "voc": "Pascal VOC",
    "cvat": "CVAT for images",
    "labelme": "labelme",
    "label-studio": "a Label Studio export",
}
ADVICE = {
    "datumaro": "a Datumaro export; in CVAT choose 'CVAT for images 1.1' or 'COCO 1.0'",
    "via": "a VIA project; in VIA choose Annotation > Export Annotations (COCO format)",
    "fiftyone": "a FiftyOne dataset; export it with `dataset_type=fo.types.COCODetectionDataset`",
    "supervisely": "a Supervisely project; export it as COCO or Pascal VOC",
    "createml": "CreateML; export it again as COCO or Pascal VOC",
}


def foreign_hint(root: Path) -> str:
    """A sentence about the format of the annotations in a folder, with the next step."""
    names = list_files(root).visible
    other_place = _yolo_hint(root, names)
    if other_place:
        return other_place
    command = f"`rfdetr-pipeline import {shlex.quote(str(root))} --to data/mine`"
    json_kinds = [json_kind(root / name) for name in _sample(names, ".json")]
    tags = [root_tag(root / name) for name in _sample(names, ".xml")]
    kinds = [*json_kinds, *(XML_TAGS.get(tag or "") for tag in tags)]
    known = next((kind for kind in kinds if kind in IMPORTED), None)
    if known:
        return f"This looks like {IMPORTED[known]}; convert it with {command}."
    kind = next((kind for kind in kinds if kind in ADVICE), None)
    if kind:
        return f"This looks like {ADVICE[kind]}."
    return f"An export in another format (Pascal VOC, CVAT, labelme ...) is converted by {command}."


def _yolo_hint(root: Path, names: Sequence[str]) -> str:
    """Where the dataset or its data.yaml may be, if only the place or the name is wrong."""
    for name in _sample(names, ".yaml") + _sample(names, ".yml"):
        try:
            content = read_data_yaml(root / name)
        except DatasetError:
            continue
        folder = (root / name).parent
        if "names" in content and folder == root:
            return f"{name} looks like the file of a YOLO dataset; rename it to data.yaml."
        if "names" in content and "train" in content:
            return f"The dataset seems to be {folder}, which has {name.rsplit('/', 1)[-1]}."
    nested = next((name for name in names if name.endswith(f"/train/{EXPORT}")), None)
    if nested:
        return f"The dataset seems to be {root / nested.removesuffix(f'/train/{EXPORT}')}."
    return ""


def _sample(names: Sequence[str], suffix: str) -> list[str]:
    """A few files, those at the top first."""
    found = [name for name in names if PurePosixPath(name).suffix.lower() == suffix]
    return sorted(found, key=lambda name: (name.count("/"), name))[:SAMPLES]


def json_kind(path: Path) -> str | None:
    """The format of a JSON file: a key of JSON_KEYS, "label-studio" or "createml"."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()
        if data.startswith(b"["):
            return _list_kind(msgspec.json.decode(data))
        keys = msgspec.json.decode(data, type=dict[str, msgspec.Raw]).keys()
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
        return None
    return next((kind for kind, wanted in JSON_KEYS.items() if wanted <= keys), None)


def _list_kind(entries: Any) -> str | None:
    tasks = [entry for entry in entries[:SAMPLES] if isinstance(entry, dict)]
    if any(map(is_label_studio_task, tasks)):
        return "label-studio"
    return "createml" if any({"image", "annotations"} <= task.keys() for task in tasks) else None


def is_label_studio_task(task: dict[str, Any]) -> bool:
    """Whether an entry is a task of Label Studio's JSON or JSON-MIN export."""
    if isinstance(task.get("data"), dict):
        return isinstance(task.get("annotations", task.get("completions")), list)
    return "annotation_id" in task or any(
        isinstance(value, list) and value and all(map(is_region, value)) for value in task.values()
    )


def is_region(value: Any) -> bool:
    """Whether a value is an annotation of the JSON-MIN export."""
    return isinstance(value, dict) and "original_width" in value


def root_tag(path: Path) -> str | None:
    """The name of the root element, read without the rest of the file; None if it is not XML."""
    try:
        for _, element in iterparse(path, events=("start",), forbid_dtd=True):
            return str(element.tag)
    except (DefusedXmlException, ParseError, ValueError, LookupError, OSError):
        pass
    return None
