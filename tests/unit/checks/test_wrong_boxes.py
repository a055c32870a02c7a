"""An error exactly where training refuses a dataset or would learn boxes beside the objects.

The objects of the test images have the colour of their class, so that the pixels under the boxes
which training uses show whether they are right.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rfdetr.checks import CheckConfig, DatasetReport, check_dataset
from rfdetr.checks.repair.copy import EVERY_FINDING, repair_dataset
from rfdetr.config import RFDETRNanoConfig, RFDETRSegNanoConfig, TrainConfig
from rfdetr.data.dataset import DetectionDataset
from rfdetr.data.transforms import EvalTransform
from rfdetr.errors import DatasetError
from rfdetr.training.datamodule import RFDETRDataModule
from tests.datasets import COLOURS, NAMES, make_roboflow, make_yolo

SPLITS = {"train": 18, "valid": 8}
SIZE = (96, 64)
SIDE = 128
MODEL = RFDETRNanoConfig.model_validate({"pretrain_weights": None, "num_classes": 3})
Record = dict[str, Any]
Change = Callable[[Path, Record, Record], None]  # images folder, image, annotation (empty: none)


def check(root: Path, cache: Path) -> DatasetReport:
    config = CheckConfig(max_findings_per_code=EVERY_FINDING)
    return check_dataset(
        root, config=config, model_config=MODEL, workers=1, cache_dir=cache, progress=False
    )


def trained(root: Path) -> tuple[int, int]:
    """Objects that training uses, and those of them that are on a pixel of their class."""
    config = TrainConfig.model_validate({"dataset_dir": str(root), "num_workers": 0})
    data = RFDETRDataModule(MODEL, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.setup("fit")
        data.setup("test")
    total = right = 0
    for dataset in data._datasets.values():
        index = dataset.index
        shown = DetectionDataset(index, EvalTransform(SIDE))
        for image, target in (shown[i] for i in range(len(shown))):
            for box, label in zip(target["boxes"], target["labels"], strict=True):
                x, y = (box[:2] * SIDE).long().clamp(0, SIDE - 1).tolist()
                colour = COLOURS[NAMES.index(index.class_names[int(label)])]
                near = zip(image[:, y, x].tolist(), colour, strict=True)
                total, right = total + 1, right + (sum(abs(a - b) for a, b in near) < 120)
    return total, right


def change_coco(root: Path, change: Change) -> Path:
    make_roboflow(root, splits=SPLITS, size=SIZE, segmentation=True)
    for split in SPLITS:
        file = root / split / "_annotations.coco.json"
        document = json.loads(file.read_text())
        images = {image["id"]: image for image in document["images"]}
        for annotation in document["annotations"]:
            change(root / split, images[annotation["image_id"]], annotation)
        for image in document["images"]:
            change(root / split, image, {})
        file.write_text(json.dumps(document))
    return root


def box(write: Callable[..., Sequence[float]], *, outlines: bool = False) -> Change:
    """Write x, y, w, h of an image of W x H in another way."""

    def change(_folder: Path, image: Record, annotation: Record) -> None:
        if annotation:
            size = image["width"], image["height"]
            annotation["bbox"] = list(write(*annotation["bbox"], *size))
            if not outlines:
                annotation["segmentation"] = []

    return change


def size(width: int, height: int) -> Change:
    """Another size in the annotation file."""
    return lambda _folder, image, _annotation: image.update(width=width, height=height)


def pixels(change: Callable[[Image.Image], Image.Image]) -> Change:
    """Other images under the same annotations."""

    def apply(folder: Path, image: Record, annotation: Record) -> None:
        if not annotation:
            with Image.open(folder / image["file_name"]) as old:
                change(old.convert("RGB")).save(folder / image["file_name"], quality=95)

    return apply


def letterboxed(image: Image.Image) -> Image.Image:
    square = Image.new("RGB", (96, 96))
    square.paste(image, (0, 16))
    return square


def with_areas(change: Change) -> Change:
    """The area of each annotation is that of its box as it is written."""

    def apply(folder: Path, image: Record, annotation: Record) -> None:
        change(folder, image, annotation)
        if annotation:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]

    return apply


PERCENT = box(lambda x, y, w, h, W, H: (100 * x / W, 100 * y / H, 100 * w / W, 100 * h / H))
CORNERS = box(lambda x, y, w, h, *_: (x, y, x + w, y + h))
COCO: dict[str, Change] = {
    "as it should be": box(lambda x, y, w, h, *_: (x, y, w, h)),
    "corners": CORNERS,
    "corners, outlines": box(lambda x, y, w, h, *_: (x, y, x + w, y + h), outlines=True),
    "centre": box(lambda x, y, w, h, *_: (x + w / 2, y + h / 2, w, h), outlines=True),
    "swapped axes": box(lambda x, y, w, h, *_: (y, x, h, w), outlines=True),
    "fractions": box(lambda x, y, w, h, W, H: (x / W, y / H, w / W, h / H)),
    "YOLO": box(lambda x, y, w, h, W, H: ((x + w / 2) / W, (y + h / 2) / H, w / W, h / H)),
    "percent": PERCENT,
    "percent, areas": with_areas(PERCENT),
    "swapped axes, areas": with_areas(box(lambda x, y, w, h, *_: (y, x, h, w))),
    "larger than annotated": pixels(lambda image: image.resize((192, 128))),
    "smaller than annotated": pixels(lambda image: image.resize((48, 32))),
    "letterboxed": pixels(letterboxed),
    "annotated too large": size(640, 640),
    "annotated one too large": size(97, 64),
    "annotated turned": size(64, 96),
    "annotated too small": size(60, 40),
}
DECISIONS = {"letterboxed", "swapped axes, areas"}  # cannot be corrected with certainty


def agrees(root: Path, cache: Path, name: str) -> None:
    """The report has an error exactly where boxes are wrong; a repair corrects them."""
    report = check(root, cache)
    try:
        total, right = trained(root)
    except DatasetError:
        total, right = 0, 0
    wrong = right < 0.8 * total or not total
    assert (report.errors > 0) == wrong, (name, right, total, report.counts)
    out = root.parent / "out"
    repair_dataset(root, report, out, check=partial(check, cache=cache))
    after = check(out, cache)
    if name in DECISIONS:
        assert after.errors
    else:
        fixed, good = trained(out)
        assert after.errors == 0 and fixed >= total and good >= 0.8 * fixed, (name, good, fixed)


@pytest.mark.parametrize("name", COCO)
def test_coco_boxes(name: str, tmp_path: Path) -> None:
    agrees(change_coco(tmp_path / "data", COCO[name]), tmp_path / "cache", name)


YOLO: dict[str, Callable[[list[float]], Sequence[float]]] = {
    "as it should be": lambda v: v,
    "corners": lambda v: (v[0] - v[2] / 2, v[1] - v[3] / 2, v[0] + v[2] / 2, v[1] + v[3] / 2),
    "top left": lambda v: (v[0] - v[2] / 2, v[1] - v[3] / 2, v[2], v[3]),
    "pixels": lambda v: (v[0] * 96, v[1] * 64, v[2] * 96, v[3] * 64),
    "percent": lambda v: [100 * value for value in v],
    "thousandths": lambda v: [1000 * value for value in v],
}


@pytest.mark.parametrize("name", YOLO)
def test_yolo_boxes(name: str, tmp_path: Path) -> None:
    root = make_yolo(tmp_path / "data", splits=SPLITS, size=SIZE)
    for file in root.glob("*/labels/*.txt"):
        rows = [line.split() for line in file.read_text().splitlines()]
        new = [(label, *YOLO[name](list(map(float, values)))) for label, *values in rows]
        file.write_text("".join(" ".join(map(str, row)) + "\n" for row in new))
    agrees(root, tmp_path / "cache", name)


def test_a_few_boxes_prove_no_format(tmp_path: Path) -> None:
    """Boxes beyond the image are what they seem if other formats could fit by chance."""
    root = make_roboflow(tmp_path / "data", splits={"train": 4, "valid": 2}, size=SIZE)
    for split in ("train", "valid"):
        file = root / split / "_annotations.coco.json"
        document = json.loads(file.read_text())
        for annotation in document["annotations"]:
            annotation["bbox"] = [40, 20, 70, 50]
        file.write_text(json.dumps(document))
    report = check(root, tmp_path / "cache")
    assert "box-format" not in report.counts and report.counts["box-outside"] > 5


@pytest.mark.parametrize("name", ["corners", "fractions", "YOLO", "as it should be"])
def test_a_few_impossible_boxes_prove_a_format(name: str, tmp_path: Path) -> None:
    """Six boxes, of less than a pixel or mostly beyond their images if they were right."""
    root = make_roboflow(tmp_path / "data", splits={"train": 4, "valid": 2}, size=SIZE)
    for split in ("train", "valid"):
        file = root / split / "_annotations.coco.json"
        document = json.loads(file.read_text())
        document["annotations"] = list(
            {row["image_id"]: row for row in document["annotations"]}.values()
        )
        for row in document["annotations"]:
            row["bbox"] = [30 + 3 * row["id"], 20 + row["id"], 30, 25]
            COCO[name](root, {"width": SIZE[0], "height": SIZE[1]}, row)
        file.write_text(json.dumps(document))
    report = check(root, tmp_path / "cache")
    assert ("box-format" in report.counts) == (name != "as it should be"), report.counts


@pytest.mark.parametrize("numbers", [2, 3])
@pytest.mark.parametrize("points", [2, 5, 17])
def test_keypoints_without_kpt_shape_are_an_error(
    points: int, numbers: int, tmp_path: Path
) -> None:
    root = make_yolo(tmp_path / "data", splits=SPLITS, size=SIZE)
    rng = np.random.default_rng(points)
    for file in root.glob("*/labels/*.txt"):
        lines = []
        for line in file.read_text().splitlines():
            box = np.array(line.split()[1:], float)
            keypoints = box[:2] + box[2:] * rng.uniform(-0.5, 0.5, (points, 2))
            keypoints[rng.random(points) < 0.2] = 0
            seen = (keypoints != 0).any(axis=1, keepdims=True)
            values = np.hstack([keypoints, seen])[:, :numbers]
            lines.append(" ".join([line, *(f"{value:.6g}" for value in values.ravel())]))
        file.write_text("\n".join(lines))
    report = check(root, tmp_path / "cache")
    assert report.errors, report.counts
    if points * numbers % 2 == 0:  # otherwise the lines are no polygons, and refused
        found = report.of("label-pose")
        assert f"kpt_shape: [{points}, {numbers}]" in found[0].message
        yaml = root / "data.yaml"
        yaml.write_text(f"{yaml.read_text()}kpt_shape: [{points}, {numbers}]\n")
        assert not check(root, tmp_path / "cache").errors
        total, right = trained(root)
        assert right >= 0.8 * total > 0


@pytest.mark.parametrize("corners", [3, 4, 5, 6, 8, 16])
@pytest.mark.parametrize("centre", [(0.5, 0.5), (0.2, 0.7)])
def test_polygons_of_equal_length_are_not_keypoints(
    corners: int, centre: tuple[float, float], tmp_path: Path
) -> None:
    """Small polygons in one place, whose first two points could be a box around the others."""
    root = make_yolo(tmp_path / "data", splits=SPLITS, size=SIZE)
    rng = np.random.default_rng(corners)
    angles = np.arange(corners) * 2 * np.pi / corners
    for file in root.glob("*/labels/*.txt"):
        lines = []
        for line in file.read_text().splitlines():
            turn, radius = rng.uniform(0, 6), rng.uniform(0.02, 0.1, 2)
            ring = np.stack([np.cos(angles + turn), np.sin(angles + turn)], axis=1) * radius
            ring += np.array(centre) + rng.uniform(-0.05, 0.05, 2)
            lines.append(" ".join([line.split()[0], *(f"{value:.6f}" for value in ring.ravel())]))
        file.write_text("\n".join(lines))
    assert "label-pose" not in check(root, tmp_path / "cache").counts


@pytest.mark.parametrize("outline", [[], [[]], [[], []], [[1, 2, 3, 4]], [[1.25] * 4, [90.5] * 4]])
@pytest.mark.parametrize("every", [1, 2])
def test_outlines_without_three_points_are_none(
    outline: list[list[float]], every: int, tmp_path: Path
) -> None:
    """Such objects have a box only: the box is the mask, and a dataset of them is refused."""

    def change(_folder: Path, _image: Record, annotation: Record) -> None:
        if annotation and annotation["id"] % every == 0:
            annotation["segmentation"] = outline

    root = change_coco(tmp_path / "data", change)
    model = RFDETRSegNanoConfig.model_validate({"pretrain_weights": None, "num_classes": 3})
    report = check_dataset(
        root, model_config=model, workers=1, cache_dir=tmp_path / "cache", progress=False
    )
    config = TrainConfig.model_validate({"dataset_dir": str(root), "num_workers": 0})
    data = RFDETRDataModule(model, config)
    if every == 1:
        assert "segmentation-none" in report.counts
        with pytest.raises(DatasetError, match="segmentation"):
            data.setup("fit")
        return
    assert report.counts["segmentation-missing"] > 5 and "segmentation-none" not in report.counts
    with pytest.warns(UserWarning, match="box"):
        data.setup("fit")
    shown = DetectionDataset(data._datasets["val"].index, EvalTransform(SIDE), masks=True)
    assert all(shown[i][1]["masks"].flatten(1).any(1).all() for i in range(len(shown)))


@pytest.mark.parametrize(
    ("copies", "level"), [(1, "warning"), (4, "warning"), (5, "error"), (8, "error")]
)
def test_copies_of_most_of_a_split_are_an_error(tmp_path: Path, copies: int, level: str) -> None:
    root = make_roboflow(tmp_path / "data", splits=SPLITS, size=SIZE)
    for number in range(copies):
        name = f"image_{number:04d}.jpg"
        (root / "train" / name).write_bytes((root / "valid" / name).read_bytes())
    found = check(root, tmp_path / "cache").of("split-duplicate-image")
    assert [finding.severity for finding in found] == [level] * copies


@pytest.mark.parametrize(
    ("parent", "used", "level"),
    [("none", True, "error"), ("tools", True, "warning"), ("none", False, "warning")],
)
def test_two_classes_of_one_name(tmp_path: Path, parent: str, used: bool, level: str) -> None:
    """An error if objects of one class become two; other parents make other classes."""
    root = make_roboflow(tmp_path / "data", splits=SPLITS, size=SIZE)
    for split in SPLITS:
        file = root / split / "_annotations.coco.json"
        document = json.loads(file.read_text())
        document["categories"].append({"id": 3, "name": "bolt", "supercategory": parent})
        bolts = [row for row in document["annotations"] if row["category_id"] == 1]
        for row in bolts[::2] if used else ():
            row["category_id"] = 3
        file.write_text(json.dumps(document))
    found = check(root, tmp_path / "cache").of("category-name-duplicate")
    assert [finding.severity for finding in found] == [level]
