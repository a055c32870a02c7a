"""`labels --folds`: every image is scored once, by a model that was trained without it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from flows.cli.main import main
from flows.stages import folds
from rfdetr.data.coco import CocoSplits
from rfdetr.data.demo import build_demo
from rfdetr.data.layouts import detect_layout
from rfdetr.data.yolo import YoloSplits
from rfdetr.errors import ConfigError
from tests.datasets import make_yolo
from tests.flows.models import write_model
from tests.flows.projects import make_project


def _paths(index) -> set[Path]:
    return {index.path(i).resolve() for i in range(len(index))}


def _check_folds(data: Path, target: Path, split: str) -> None:
    layout = detect_layout(data)
    read = YoloSplits if layout.kind == "yolo" else CocoSplits
    whole = read(layout).index(split)
    number = folds.assign(whole, 3)
    boxes = np.diff(whole.first)
    assert sorted(np.bincount(number)) == sorted(len(a) for a in np.array_split(number, 3))
    held: set[Path] = set()
    for fold in range(3):
        folder = target / f"{split}{fold}"
        folder.mkdir(parents=True)
        rows = np.flatnonzero(number == fold)
        folds.write_fold(layout, split, whole, rows, folder)
        parts = read(detect_layout(folder))
        out, rest = parts.index("test"), parts.index(split)
        assert _paths(out) == {whole.path(i).resolve() for i in rows}
        assert _paths(rest) == _paths(whole) - _paths(out)
        assert np.array_equal(np.diff(out.first), boxes[rows])
        assert out.class_names == whole.class_names
        labels = np.concatenate([whole.labels[whole.rows(i)] for i in rows])
        assert np.array_equal(out.labels, labels)
        other = {"train": "val", "val": "train"}[split]
        assert _paths(parts.index(other)) == _paths(read(layout).index(other))
        held |= _paths(out)
    assert held == _paths(whole)


def test_folds_of_coco(tmp_path: Path) -> None:
    data = build_demo(tmp_path / "data", train=10, valid=7, test=2)
    for split in ("train", "val"):
        _check_folds(data, tmp_path / "folds", split)


def test_folds_of_yolo(tmp_path: Path) -> None:
    data = tmp_path / "yolo"
    for split, count in (("train", 8), ("val", 7)):
        for i in range(count):
            image = data / "images" / split / f"{i:02d} ä.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (i, 9, 9)).save(image)
            label = data / "labels" / split / f"{i:02d} ä.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(f"{i % 2} 0.5 0.5 0.2 0.{i + 1}\n" * (i % 3))
    lines = {"train": "images/train", "val": "images/val", "names": ["no", "a: b"]}
    (data / "data.yaml").write_text(yaml.safe_dump(lines))
    for split in ("train", "val"):
        _check_folds(data, tmp_path / "folds", split)


def test_more_folds_than_images_with_boxes_are_refused(tmp_path: Path) -> None:
    data = build_demo(tmp_path / "data", train=3, valid=2, test=2)
    index = CocoSplits(detect_layout(data)).index("train")
    with pytest.raises(ConfigError, match=r"--folds is 40, but only \d images"):
        folds.assign(index, 40)


def test_wrong_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_project(tmp_path / "project")
    build_demo(root / "data" / "demo", train=2, valid=2, test=2)
    weights = write_model(tmp_path).weights
    monkeypatch.chdir(root)
    for wrong, words in (
        (["--folds", "3"], "has not seen the test split"),
        (["--folds", "1", "--split", "train"], "at least 2"),
        (["--folds", "2", "--split", "train", "--model", str(weights)], "leave --model out"),
    ):
        assert main(["labels", *wrong]) != 0
        assert words in capsys.readouterr().err


def _boxes(data: Path) -> dict[str, list[list[float]]]:
    """The boxes of the training images by their path in the dataset, in pixels."""
    layout = detect_layout(data)
    index = (YoloSplits if layout.kind == "yolo" else CocoSplits)(layout).index("train")
    found = {}
    for i in range(len(index)):
        with Image.open(index.path(i)) as image:
            corners = index.pixel_boxes(index.rows(i), *image.size)
        sides = np.c_[corners[:, :2], corners[:, 2:] - corners[:, :2]]
        found[index.path(i).relative_to(data).as_posix()] = sides.tolist()
    return found


def _plant_duplicates(data: Path) -> set[str]:
    """Label the first object of every fourth training image twice; returns the images."""
    file = data / "train" / "_annotations.coco.json"
    found = set()
    if not file.exists():
        for labels in sorted((data / "train/labels").glob("*.txt"))[::4]:
            label, x, *rest = labels.read_text().split("\n")[0].split()
            again = " ".join([label, f"{float(x) + 0.002:.6f}", *rest])
            labels.write_text(f"{labels.read_text().rstrip()}\n{again}\n")
            found.add(f"train/images/{labels.stem}.png")
        return found
    document = json.loads(file.read_text())
    rows = document["annotations"]
    names = {image["id"]: image["file_name"] for image in document["images"]}
    for image in [*names][::4]:
        for row in [row for row in rows if row["image_id"] == image][:1]:
            x, *rest = row["bbox"]
            rows.append({**row, "id": 10_000 + len(rows), "bbox": [x + 1, *rest]})
            found.add(f"train/{names[image]}")
    file.write_text(json.dumps(document))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["coco", "yolo"])
def test_the_command_trains_a_model_per_fold_once(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_project(tmp_path / "project", dataset={"name": "mine", "dir": "data/mine"})
    data = root / "data" / "mine"
    if layout == "coco":
        build_demo(data, train=24, valid=6, test=8)
    else:
        make_yolo(data, splits={"train": 24, "valid": 6, "test": 8})
    planted = _plant_duplicates(data)
    monkeypatch.chdir(root)
    monkeypatch.setenv("RFDETR_STATE_DIR", str(tmp_path / "state"))
    assert main(["validate"]) == 0
    assert main(["convert"]) == 0
    command = ["labels", "--split", "train", "--folds", "2", "--limit", "10000"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "2 trainings of 2 epochs, each on the other 1 of 2 parts" in output
    assert output.count("12 images held out") == 2
    assert "Scored by 2 models, each trained without the labels that it scored." in output
    boxes = _boxes(data)
    assert f"{sum(map(len, boxes.values()))} labels" in output
    record = json.loads((root / "reports" / "suspected_labels.json").read_text())
    assert all(s["image"] in boxes for s in record["suspects"])
    assert {s["image"] for s in record["suspects"] if s["kind"] == "duplicate"} == planted
    for suspect in (s for s in record["suspects"] if "box" in s):  # a label of this image
        own = boxes[suspect["image"]][suspect["annotation"]]
        assert np.allclose(own, suspect["box"], atol=0.02)
    assert len(list((tmp_path / "state" / "fit").iterdir())) == 2
    assert main(command) == 0
    assert capsys.readouterr().out.count("already trained") == 2
    assert json.loads((root / "reports" / "suspected_labels.json").read_text()) == record
