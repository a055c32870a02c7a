"""The report and training read the same classes from the same categories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rfdetr.checks import DatasetReport, check_dataset
from rfdetr.config import RFDETRSegNanoConfig
from rfdetr.data.coco import CocoSplits
from rfdetr.data.layouts import Kind, detect_layout
from rfdetr.data.yolo import YoloSplits
from rfdetr.errors import DatasetError
from tests.datasets import make_coco, make_roboflow, make_yolo


def check(root: Path, kind: Kind) -> DatasetReport:
    return check_dataset(root, kind, cache_dir=root.parent / "cache", workers=1, progress=False)


def trained(root: Path, kind: Kind) -> list[str]:
    return list(CocoSplits(detect_layout(root, kind)).index("train").class_names)


def with_parent(root: Path, parent: str, crowd: bool) -> Path:
    """An export whose categories have the parent 9, which is used by a crowd region or by none."""
    make_roboflow(root)
    for path in root.glob("*/_annotations.coco.json"):
        document = json.loads(path.read_text())
        for category in document["categories"]:
            category["supercategory"] = parent
        document["categories"].append({"id": 9, "name": parent, "supercategory": "none"})
        row = {"id": 999, "image_id": 1, "category_id": 9, "bbox": [0, 0, 9, 9], "iscrowd": 1}
        document["annotations"] += [row] if crowd else []
        path.write_text(json.dumps(document))
    return root


@pytest.mark.parametrize("parent", ["parts", "None", "none", " none "])
@pytest.mark.parametrize("crowd", [False, True])
def test_parents_of_an_export(parent: str, crowd: bool, tmp_path: Path) -> None:
    root = with_parent(tmp_path / "data", parent, crowd)
    report = check(root, "roboflow")
    assert report.class_names == trained(root, "roboflow")
    dropped = parent not in report.class_names
    assert dropped == bool(report.of("category-ghost"))
    assert dropped == (not crowd and parent != "none")


def test_gaps_of_plain_coco_are_classes_without_a_name(tmp_path: Path) -> None:
    root = make_coco(tmp_path / "data", first_id=5)
    report = check(root, "coco")
    assert report.class_names == trained(root, "coco")
    assert report.class_names == [*["N/A"] * 5, "washer", "bolt", "nut"]
    assert list(report.statistics["train"].class_counts) == ["washer", "bolt", "nut"]


@pytest.mark.parametrize("first_id", [-1, 9_999, 10**12])
def test_ids_that_cannot_be_labels(first_id: int, tmp_path: Path) -> None:
    root = make_coco(tmp_path / "data", first_id=first_id)
    report = check(root, "coco")
    assert not report.ok
    assert f"the id {max(first_id, first_id + 2 * (first_id > 0))}" in " ".join(
        finding.message for finding in report.of("category-id-range")
    )
    with pytest.raises(DatasetError, match=r"0\.\.10000"):
        trained(root, "coco")


@pytest.mark.parametrize("names", ["[yes, no, 01]", "{0: yes, 1: no, 2: 01}"])
def test_names_of_data_yaml_are_text(names: str, tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data", yaml_text=f"names: {names}\n")
    assert check(root, "yolo").class_names == ["yes", "no", "01"]


def test_an_absent_test_folder_is_only_a_missing_split(tmp_path: Path) -> None:
    text = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnames: [a, b, c]\n"
    splits = {"train": 12, "valid": 6}
    root = make_yolo(tmp_path / "data", splits=splits, yaml_text=text, seed=5, background=4)
    report = check(root, "roboflow")
    assert (report.errors, report.warnings) == (0, 0), [f.message for f in report.findings]
    assert [finding.split for finding in report.of("split-test-missing")] == ["test"]


@pytest.mark.parametrize("first", ["1_0", "+1", "١"])
def test_a_class_that_is_not_a_plain_number(first: str, tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data")
    label = next(iter(sorted((root / "train/labels").iterdir())))
    label.write_text(f"0 0.5 0.5 0.2 0.2\n{first} 0.5 0.5 0.2 0.2\n", encoding="utf-8")
    found = check(root, "yolo").of("label-line-malformed")
    assert [finding.line for finding in found] == [2]
    with pytest.raises(DatasetError, match=r"line 2: the class .* is not an integer"):
        YoloSplits(detect_layout(root)).index("train")


@pytest.mark.parametrize("every", [1, 2])
def test_a_segmentation_model_needs_segmentations(every: int, tmp_path: Path) -> None:
    root = make_roboflow(tmp_path / "data", segmentation=True)
    path = root / "train" / "_annotations.coco.json"
    document = json.loads(path.read_text())
    for row in document["annotations"][::every]:
        row["segmentation"] = []
    path.write_text(json.dumps(document))
    model = RFDETRSegNanoConfig.model_validate({"pretrain_weights": None})
    report = check_dataset(
        root, model_config=model, workers=1, cache_dir=tmp_path / "cache", progress=False
    )
    found = {finding.code: finding.severity for finding in report.findings}
    if every == 1:
        assert found["segmentation-none"] == "error"
    else:
        assert found["segmentation-missing"] == "warning"
        assert report.counts["segmentation-missing"] == len(document["annotations"][::2])
        assert "segmentation-none" not in found
