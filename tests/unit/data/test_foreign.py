from __future__ import annotations

import json
from pathlib import Path

import pytest

from rfdetr.data.layouts import detect_layout
from rfdetr.errors import DatasetError
from tests.datasets import make_roboflow, make_yolo

TASK = {"data": {"image": "a.jpg"}, "annotations": []}
FOLDERS = {
    "Pascal VOC": ("VOC2012/Annotations/a.xml", "<annotation><folder>x</folder></annotation>"),
    "CVAT for images": ("annotations.xml", "<annotations><version>1.1</version></annotations>"),
    "labelme": ("images/a.json", json.dumps({"version": "5", "shapes": [], "imagePath": "a.jpg"})),
    "Label Studio": ("export.json", json.dumps([TASK])),
    "COCO annotations in other folders": (
        "labels.json",
        json.dumps({"images": [], "annotations": [], "categories": []}),
    ),
}


@pytest.mark.parametrize("kind", ["roboflow", "coco", "yolo"])
@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_a_foreign_format_is_named_with_the_command(tmp_path: Path, name: str, kind: str) -> None:
    file, text = FOLDERS[name]
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    with pytest.raises(DatasetError) as raised:
        detect_layout(tmp_path, kind)  # type: ignore[arg-type]
    assert f"looks like {'a ' if name == 'Label Studio' else ''}{name}" in str(raised.value)
    assert f"rfdetr-pipeline import {tmp_path} --to data/mine" in str(raised.value)


def test_a_format_that_is_not_imported_is_named_with_the_export(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text(json.dumps({"samples": []}))
    with pytest.raises(DatasetError, match=r"FiftyOne.*COCODetectionDataset"):
        detect_layout(tmp_path)


def test_the_yaml_file_of_a_fiftyone_export_is_read(tmp_path: Path) -> None:
    root = make_yolo(tmp_path, splits={"train": 2, "valid": 1}, yaml_name="dataset.yaml")
    assert detect_layout(root).kind == "yolo"


def test_a_dataset_in_a_subfolder_or_under_another_name_is_named(tmp_path: Path) -> None:
    make_yolo(tmp_path / "yolo" / "set", splits={"train": 2, "valid": 1})
    with pytest.raises(DatasetError, match=r"dataset seems to be .*/yolo/set, which has data.yaml"):
        detect_layout(tmp_path / "yolo")
    make_roboflow(tmp_path / "coco" / "v1", splits={"train": 2, "valid": 1})
    with pytest.raises(DatasetError, match=r"dataset seems to be .*/coco/v1\."):
        detect_layout(tmp_path / "coco")
    root = make_yolo(tmp_path / "named", splits={"train": 2}, yaml_name="coco128.yaml")
    with pytest.raises(DatasetError, match=r"coco128.yaml looks like .* rename it to data.yaml"):
        detect_layout(root)
