from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rfdetr.data.geometry import (
    ImageObjects,
    View,
    clip,
    crop,
    flip,
    relative,
    resize,
    show,
    show_mask,
)


def objects(boxes: list[list[float]], height: int, width: int) -> ImageObjects:
    array = np.array(boxes, np.float32)
    areas = (array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1])
    return ImageObjects(array, areas, np.arange(len(array)), height, width)


def check(found: ImageObjects, expected: dict) -> None:
    np.testing.assert_allclose(found.boxes, expected["boxes"], atol=1e-4)
    np.testing.assert_allclose(found.areas, expected["area"], rtol=1e-5, atol=1e-4)
    assert found.rows.tolist() == expected["labels"]
    assert [found.height, found.width] == expected["size"]


def test_crop_flip_and_resize(parity: Path) -> None:
    cases = json.loads((parity / "training/geometry.json").read_text())["cases"]
    assert len(cases) >= 4
    for case in cases:
        given = objects(case["boxes"], case["height"], case["width"])
        window = case["crop"]
        part = crop(given, window["top"], window["left"], window["height"], window["width"])
        check(part, window["expected"])
        check(flip(given), case["hflip"])
        check(resize(given, 96, 64), case["resize_to_h96_w64"])


def test_relative_boxes_of_the_evaluation_view(parity: Path) -> None:
    stored = json.loads((parity / "training/eval_transform.json").read_text())
    for case in stored["square_cases"]:
        given = objects(case["boxes_in_xyxy"], case["height"], case["width"])
        side = case["resolution"]
        view = View(0, 0, case["height"], case["width"], side, side)
        found, expected = show(given, view), case["expected_target"]
        boxes = np.array(expected["boxes_cxcywh_normalised"])
        np.testing.assert_allclose(relative(found), boxes, atol=1e-6)
        np.testing.assert_allclose(found.areas, expected["area"], rtol=1e-5)
        assert [found.height, found.width] == expected["size"]


def test_clip_removes_what_has_no_extent() -> None:
    given = objects([[-5, 2, 4, 6], [10, 10, 10, 20], [60, 1, 70, 9], [38, 2, 60, 90]], 30, 40)
    found = clip(given)
    assert found.rows.tolist() == [0, 3]
    assert found.boxes.tolist() == [[0, 2, 4, 6], [38, 2, 40, 30]]
    assert found.areas.tolist() == given.areas[[0, 3]].tolist()


@pytest.mark.parametrize("mirrored", [False, True])
def test_masks_follow_their_boxes(mirrored: bool) -> None:
    mask = np.zeros((60, 80), bool)
    mask[20:40, 30:60] = True
    view = View(10, 20, 40, 50, 80, 100, mirrored)
    shown = show_mask(mask, view)
    found = show(objects([[30, 20, 60, 40]], 60, 80), view)
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert found.boxes[0].tolist() == box
    assert shown.sum() == found.areas[0]
