from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rfdetr.data.coco import CocoSplits
from rfdetr.data.folders import list_files, missing_hints
from rfdetr.data.layouts import detect_layout
from rfdetr.data.yolo import LabelFiles, YoloSplits
from rfdetr.data.yolo_labels import LineError, parse_line
from rfdetr.errors import DatasetError
from tests.datasets import make_roboflow, make_yolo


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def test_linked_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    root, other = tmp_path / "data", tmp_path / "other"
    touch(root / "a.png", root / "deep" / "b.png", other / "c.png")
    (root / "linked").symlink_to(other)
    (root / "deep" / "loop").symlink_to(root)
    (root / "dangling.png").symlink_to(root / "nothing.png")
    touch(root / ".git" / "x.png", root / "._a.png", root / "__MACOSX" / "a.png")
    found = list_files(root)
    assert found.visible == ["a.png", "deep/b.png", "linked/c.png"]
    assert found.hidden == ["._a.png", ".git/x.png", "__MACOSX/a.png"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("images\\a b.jpg", "backslashes, write forward slashes; images/a b.jpg exists"),
        ("images/a%20b.jpg", "URL-encoded; images/a b.jpg exists"),
        ("a b.jpg", "images/a b.jpg exists: the folder in the name is wrong"),
        ("images/a_b.jpg", "the nearest name is images/a b.jpg"),
        ("C:\\data\\zzz.png", "backslashes, write forward slashes"),
        ("zzz.png", ""),
        ("images/a b.jpg ", "spaces around it; images/a b.jpg exists"),
        ("images/A B.JPG", "images/a b.jpg exists: it differs in upper and lower case"),
        ("u\u0308ber.jpg", "it differs in the Unicode form of a letter"),
        ("a b", "images/a b.jpg exists: the name has no suffix"),
    ],
)
def test_the_cause_of_a_missing_file(tmp_path: Path, name: str, hint: str) -> None:
    touch(tmp_path / "images" / "a b.jpg", tmp_path / "\u00fcber.jpg")
    assert hint in missing_hints(tmp_path, [name])[0]


def test_training_names_the_cause_of_missing_images(tmp_path: Path) -> None:
    root = make_roboflow(tmp_path)
    path = root / "train" / "_annotations.coco.json"
    document = json.loads(path.read_text())
    for image in document["images"]:
        image["file_name"] = f"images\\{image['file_name']}"
    path.write_text(json.dumps(document))
    with pytest.raises(DatasetError, match=r"backslashes.*the folder in the name is wrong"):
        CocoSplits(detect_layout(root)).index("train")


def test_training_names_the_cause_of_missing_listed_images(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    (root / "train.txt").write_text(".\\train\\images\\image_0000.png\n")
    text = (root / "data.yaml").read_text().replace("train: train/images", "train: train.txt")
    (root / "data.yaml").write_text(text)
    with pytest.raises(DatasetError, match=r"backslashes.*train/images/image_0000.png exists"):
        YoloSplits(detect_layout(root)).index("train")


def test_where_label_files_are_expected_and_where_they_are(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    (root / "train" / "labels").rename(root / "train" / "Labels")
    ledger = YoloSplits(detect_layout(root)).index("train").ledger
    assert "labels/image_0000.txt does not exist, but 5 such file(s)" in ledger.without_objects()
    assert str(root / "train" / "Labels" / "image_0000.txt") in ledger.without_objects()
    shutil.rmtree(root / "train" / "Labels")
    ledger = YoloSplits(detect_layout(root)).index("train").ledger
    assert "no label file exists; the first is expected to be" in ledger.without_objects()


def test_label_files_with_an_upper_case_suffix_and_beside_the_images(tmp_path: Path) -> None:
    root = make_yolo(tmp_path)
    before = YoloSplits(detect_layout(root)).index("train").boxes
    for number, path in enumerate(sorted((root / "train" / "labels").iterdir())):
        if number % 2:
            path.rename(path.with_suffix(".TXT"))
    assert (YoloSplits(detect_layout(root)).index("train").boxes == before).all()
    for path in (root / "train" / "labels").iterdir():
        path.rename(root / "train" / "images" / path.name)
    image = root / "train" / "images" / "image_0000.png"
    assert LabelFiles().of(image) == root / "train" / "labels" / "image_0000.txt"
    (root / "train" / "labels").rmdir()
    assert LabelFiles().of(image) == image.with_suffix(".txt")
    assert (YoloSplits(detect_layout(root)).index("train").boxes == before).all()


def test_pose_labels(tmp_path: Path) -> None:
    box = "1 0.5 0.45 0.2 0.3"
    corners = pytest.approx((0.4, 0.3, 0.6, 0.6))
    row = parse_line(f"{box} 0.45 0.45 0.55 0.45", 2, keypoint_values=4)
    assert row.box == corners and row.polygon == []
    assert parse_line(box, 2, keypoint_values=4).box == corners
    with pytest.raises(LineError, match=r"with kpt_shape: .* 5, or 9 with keypoints"):
        parse_line(f"{box} 0.1 0.2", 2, keypoint_values=4)
    with pytest.raises(LineError, match="keypoints with visibility; pose labels need kpt_shape"):
        parse_line(f"{box} 0.1 0.2 2 0.3 0.4 1", 2)
    assert len(parse_line("0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5 0.2 0.2", 2).polygon) == 10
    root = make_yolo(tmp_path)
    text = (root / "data.yaml").read_text()
    (root / "data.yaml").write_text(text + "kpt_shape: [2, 2]\n")
    assert detect_layout(root).keypoint_values == 4
    (root / "data.yaml").write_text(text + "kpt_shape: two\n")
    with pytest.raises(DatasetError, match="kpt_shape: must be"):
        detect_layout(root)
