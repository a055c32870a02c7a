"""Annotation rows to targets, against the stored conversions."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rfdetr.data.categories import CategoryTable
from rfdetr.data.coco import build_index
from rfdetr.data.coco_json import read_coco
from rfdetr.data.dataset import DetectionDataset
from rfdetr.data.geometry import View
from rfdetr.data.index import PolygonOutlines
from rfdetr.data.layouts import detect_layout
from rfdetr.data.transforms import EvalTransform
from rfdetr.data.yolo import YoloSplits
from rfdetr.data.yolo_labels import parse_line, read_labels
from rfdetr.errors import DatasetError

WIDTH, HEIGHT = 40, 30
IDS = (4, 9, 11)


class Unchanged(EvalTransform):
    """The image at its own size, so that boxes are those of the file."""

    def __init__(self) -> None:
        super().__init__(0)

    def view(self, height: int, width: int, rng: object = None) -> object:  # type: ignore[override]
        from rfdetr.data.geometry import View

        return View(0, 0, height, width, height, width)


@pytest.fixture
def conversion(parity: Path) -> dict:
    return json.loads((parity / "training/dataset_conversion.json").read_text())


def coco_dataset(folder: Path, rows: list[dict], labels: dict[int, int], masks: bool) -> tuple:
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    for i, row in enumerate(rows):
        row.update(id=i + 1, image_id=3)
    document = {
        "images": [{"id": 3, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": rows,
        "categories": [{"id": i, "name": f"c{i}"} for i in IDS],
    }
    path = folder / "_annotations.coco.json"
    path.write_text(json.dumps(document))
    table = CategoryTable(labels, tuple(f"c{i}" for i in range(max(labels.values()) + 1)))
    index = build_index(read_coco(path), folder, table, masks=masks)
    return DetectionDataset(index, Unchanged(), masks=masks)[0]


def check(target: dict, expected: dict) -> None:
    scale = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    boxes = target["boxes"] * scale
    corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
    torch.testing.assert_close(corners, torch.tensor(expected["boxes"]), atol=1e-4, rtol=0)
    for key in ("labels", "image_id", "area", "iscrowd", "orig_size", "size"):
        assert target[key].tolist() == expected[key], key
    assert target["boxes"].dtype == target["area"].dtype == torch.float32
    for key in ("labels", "image_id", "iscrowd", "orig_size", "size"):
        assert target[key].dtype == torch.int64, key


def test_mapped_ids(conversion: dict, tmp_path: Path) -> None:
    coco = conversion["coco"]
    labels = {int(k): v for k, v in coco["cat2label"].items()}
    _, target = coco_dataset(tmp_path, coco["annotations"], labels, False)
    check(target, coco["expected_remapped"])
    assert "masks" not in target


def test_raw_ids(conversion: dict, tmp_path: Path) -> None:
    coco = conversion["coco"]
    _, target = coco_dataset(tmp_path, coco["annotations"], {i: i for i in IDS}, False)
    check(target, coco["expected_raw_ids"])


def test_masks_and_crowd_regions(conversion: dict, tmp_path: Path) -> None:
    coco = conversion["coco"]
    labels = {int(k): v for k, v in coco["cat2label"].items()}
    _, target = coco_dataset(tmp_path, coco["annotations"], labels, True)
    expected = coco["expected_with_masks"]
    check(target, expected)
    assert target["masks"].dtype == torch.bool
    stored = [np.array([list(row) for row in mask]) == "1" for mask in expected["masks_rows"]]
    np.testing.assert_array_equal(target["masks"], stored)
    assert target["crowd_boxes"].tolist() == [[1, 1, 31, 26]]
    assert target["crowd_labels"].tolist() == [1]
    (crowd,) = target["crowd_masks"]
    assert crowd["size"] == [HEIGHT, WIDTH]
    assert isinstance(crowd["counts"], bytes)


def test_the_mask_of_an_object_without_a_segmentation_is_its_box(tmp_path: Path) -> None:
    row = {"bbox": [1, 1, 5, 5], "category_id": 4, "area": 25}
    _, target = coco_dataset(tmp_path, [row, {**row, "segmentation": []}], {4: 0}, True)
    assert target["masks"].shape == (2, HEIGHT, WIDTH)
    assert target["masks"][:, 1:6, 1:6].all()
    assert not target["masks"][:, 7:].any() and not target["masks"][:, :, 7:].any()


@pytest.mark.parametrize("area", [-3, 0])
def test_an_area_that_cannot_be_is_that_of_the_box(area: int, tmp_path: Path) -> None:
    row = {"bbox": [1, 1, 4, 5], "category_id": 4, "area": area}
    _, target = coco_dataset(tmp_path, [row], {4: 0}, False)
    assert target["area"].tolist() == [20.0]


def test_missing_area_is_that_of_the_box(tmp_path: Path) -> None:
    row = {"bbox": [1, 1, 5, 4], "category_id": 4}
    _, target = coco_dataset(tmp_path, [row], {4: 0}, False)
    assert target["area"].tolist() == [20.0]


def test_no_objects(tmp_path: Path) -> None:
    _, target = coco_dataset(tmp_path, [], {4: 0}, True)
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, HEIGHT, WIDTH)
    assert target["labels"].shape == target["area"].shape == (0,)


def test_broken_segmentation_names_the_file(tmp_path: Path) -> None:
    row = {"bbox": [1, 1, 5, 5], "category_id": 4, "segmentation": {"size": [2, 2], "counts": [4]}}
    with pytest.raises(DatasetError, match=r"a\.png.*RLE size"):
        coco_dataset(tmp_path, [row], {4: 0}, True)


def yolo_dataset(root: Path, lines: list[str], masks: bool) -> DetectionDataset:
    for folder in ("train/images", "train/labels"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "train/images/a.png")
    (root / "train/labels/a.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text("names: [a, b, c]\n")
    index = YoloSplits(detect_layout(root), masks=masks).index("train")
    return DetectionDataset(index, Unchanged(), masks=masks)


def test_yolo_lines(conversion: dict, tmp_path: Path) -> None:
    cases = conversion["yolo"]["lines"]
    good = [case for case in cases if not case["error"]]
    dataset = yolo_dataset(tmp_path, [case["line"] for case in good], True)
    boxes = dataset.index.pixel_boxes(dataset.index.rows(0), WIDTH, HEIGHT)
    np.testing.assert_allclose(boxes, [case["xyxy_before_clip"] for case in good], atol=1e-4)
    _, target = dataset[0]
    assert target["labels"].tolist() == [case["class_id"] for case in good]
    assert target["masks"].sum((1, 2)).tolist() == [case["mask_pixels_pil"] for case in good]
    limits = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT])
    clipped = np.clip([case["xyxy_before_clip"] for case in good], 0, limits)
    areas = (clipped[:, 2] - clipped[:, 0]) * (clipped[:, 3] - clipped[:, 1])
    np.testing.assert_allclose(target["area"], areas, rtol=1e-4)


def test_yolo_bad_lines_come_together_with_their_numbers(conversion: dict, tmp_path: Path) -> None:
    bad = [case["line"] for case in conversion["yolo"]["lines"] if case["error"]]
    for line in bad:
        with pytest.raises(ValueError, match=r"."):
            parse_line(line, 3)
    with pytest.raises(DatasetError) as caught:
        yolo_dataset(tmp_path, ["0 0.5 0.5 0.1 0.1", *bad, "1 nan 0.5 0.1 0.1"], False)
    text = str(caught.value)
    for number in range(2, len(bad) + 3):
        assert f"a.txt, line {number}:" in text
    assert f"{len(bad) + 1} problem(s)" in text


@pytest.mark.parametrize("word", ["1_0", "+1", "\u0661", "1.5", "9" * 30, "1e0", "x"])
def test_the_class_of_a_yolo_line_is_plain_digits(word: str) -> None:
    with pytest.raises(ValueError, match="is not an integer"):
        parse_line(f"{word} 0.5 0.5 0.2 0.2", 20)


@pytest.mark.parametrize("word", ["1", "1.0", "1.", "1.000000000000000000e+00"])
def test_the_class_of_a_yolo_line_may_be_written_by_numpy(word: str) -> None:
    assert parse_line(f"{word} 0.5 0.5 0.2 0.2", 20).label == 1


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("0 0.5 0.5 0.2 0.2 0.9", "save_conf"),
        ("0,0.5,0.5,0.2,0.2", "spaces"),
        ("0 0,5 0,5 0,2 0,2", "decimal commas"),
        ("1 1 9 1 9 9 1 9 plane 0", "DOTA"),
    ],
)
def test_what_a_line_may_be_is_named(line: str, hint: str) -> None:
    with pytest.raises(DatasetError, match=hint):
        parse_line(line, 3)


@pytest.mark.parametrize("word", ["0_5", "\u0660.5"])
def test_the_numbers_of_a_yolo_line_are_ascii(word: str) -> None:
    with pytest.raises(ValueError, match="not all values are numbers"):
        parse_line(f"1 {word} 0.5 0.2 0.2", 20)


def test_yolo_label_file_with_blank_lines_and_none(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf0 0.5 0.5 0.1 0.1\r\n\r\n   \n")
    rows, problems = read_labels(path, 1)
    assert [row.line for row in rows] == [1]
    assert problems == []
    assert read_labels(tmp_path / "none.txt", 1) == ([], [])
    path.write_bytes(b"\xff\xfe0 0.5")
    assert "UTF-8" in read_labels(path, 1)[1][0].reason


@pytest.mark.parametrize("kind", ["coco", "yolo"])
@pytest.mark.parametrize("flip", [False, True])
def test_polygons_of_large_images_are_scaled_before_they_are_filled(
    kind: str, flip: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The masks of training equal those filled at full size and reduced, up to their edges."""
    rng = np.random.default_rng(0)
    side, rings = 1600, []
    for _ in range(20):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 24))
        centre, radius = rng.uniform(0, side, 2), rng.uniform(60, 500, 24)
        ring = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        rings.append(ring.clip(0, side))
    file = SimpleNamespace(width=side, height=side, path=tmp_path)
    dataset = object.__new__(DetectionDataset)
    outlines: Any = [[ring.ravel().tolist()] for ring in rings]
    if kind == "yolo":
        ends = 48 * np.arange(21)
        outlines = PolygonOutlines(np.concatenate(rings).ravel() / side, ends[:-1], ends[1:])
    dataset.index = SimpleNamespace(outlines=outlines, masked=None)
    view = View(137.0, 203.5, 1100.0, 1100.0, 224, 224, flip)
    rows = np.arange(20)
    scaled = dataset._shown_masks(rows, file, view)
    monkeypatch.setattr("rfdetr.data.dataset.REDUCED", 1e9)
    full = dataset._shown_masks(rows, file, view)
    edge = [perimeter(mask) for mask in full]
    assert sum(edge) > 1000
    differing = (scaled != full).sum((1, 2))
    assert (differing <= 0.15 * np.array(edge) + 2).all()


def perimeter(mask: np.ndarray) -> int:
    return int((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())
