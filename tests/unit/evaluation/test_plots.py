"""Plots and tables of an evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from rfdetr.evaluation import report
from rfdetr.evaluation.box_table import data_from_coco
from rfdetr.evaluation.evaluator import evaluate
from rfdetr.evaluation.plots import (
    CELL_PIXELS,
    DETECTION_COLOUR,
    TRUTH_COLOUR,
    Sample,
    draw_class_precision,
    draw_evaluation,
    draw_history,
    sample_sheet,
)
from tests.unit.evaluation.random_sets import random_set

NONE = np.zeros(0, np.int64)


@pytest.fixture(params=["bbox", "segm"])
def evaluation(request):
    masks = request.param == "segm"
    document, results = random_set(4, masks=masks)
    data = data_from_coco(document, results, masks=masks)
    kinds = ("bbox", "segm") if masks else ("bbox",)
    result = evaluate(data, [c["id"] for c in document["categories"]], iou_types=kinds)
    side = document["images"][0]["height"]
    samples = [
        Sample(image["id"], np.full((40, 40, 3), 200, dtype=np.uint8), (side, side))
        for image in document["images"][:4]
    ]
    return result, data, samples


def test_plots_are_small_png_files(evaluation, tmp_path):
    result, data, samples = evaluation
    names = ["a/b", "cost $x$ and $y", "日本語", "plain", "more"][: len(result.class_ids)]
    plots = draw_evaluation(result, data, names, samples, tmp_path / "plots")
    assert set(plots) == {"confusion_matrix", "precision_recall", "f1_threshold", "samples"}
    for path in plots.values():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
        assert path.stat().st_size < 150_000
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == sorted(
        p.name for p in plots.values()
    )


@pytest.mark.parametrize("kind", ["truth", "detections"])
def test_boxes_are_drawn_in_their_colour_where_they_are(evaluation, kind):
    result, data, samples = evaluation
    drawn = data.truth.take(~data.truth.crowd)
    if kind == "detections":
        certain = data.detections.score.astype(np.float32) >= result.sweep.best_threshold
        drawn = data.detections.take(certain)
    only = dataclasses.replace(
        data,
        **{"truth": data.truth.take(NONE), "detections": data.detections.take(NONE), kind: drawn},
    )
    names = [str(label) for label in result.class_ids]
    colour = TRUTH_COLOUR if kind == "truth" else DETECTION_COLOUR
    checked = 0
    for sample in samples:
        cell = np.asarray(sample_sheet(result, only, names, [sample]))
        boxes = drawn.box[drawn.image == np.searchsorted(data.image_ids, sample.image_id)]
        start = 0 if kind == "truth" else CELL_PIXELS  # truth on the left, detections on the right
        for x, y, w, h in boxes * CELL_PIXELS / sample.size[0]:
            right = start + min(CELL_PIXELS, round(x + w)) - 1
            left, bottom = start + max(0, round(x)) + 2, round(y + h)
            edge = cell[bottom - 2 : bottom + 1, left:right]
            if edge.size and bottom < CELL_PIXELS:
                assert (edge == colour).all(axis=-1).all(axis=1).any()  # a line from side to side
                checked += 1
    assert checked > 0


def test_samples_are_named_and_counted(evaluation):
    result, data, samples = evaluation
    named = [dataclasses.replace(samples[0], name="folder/photo 1.jpg")]
    names = [str(label) for label in result.class_ids]
    sheet = np.asarray(sample_sheet(result, data, names, named))
    assert sheet.shape[1] >= 2 * CELL_PIXELS
    caption = sheet[CELL_PIXELS:]
    assert (caption[:, :CELL_PIXELS, 0] < 128).any(), "green text"
    assert (caption[:, CELL_PIXELS:, 1] < 128).any(), "red text"
    other = [dataclasses.replace(samples[0], name="folder/another.jpg")]
    different = np.asarray(sample_sheet(result, data, names, other)) != sheet
    assert different[CELL_PIXELS:, :CELL_PIXELS].any()
    assert not different[:CELL_PIXELS].any()


def test_history_draws_every_curve_that_has_values(tmp_path):
    rows = [
        {"epoch": 1.0, "train/loss": 4.0, "val/mAP_50_95": 0.1},
        {"epoch": 2.0, "train/loss": 3.0},
        {"epoch": 3.0, "train/loss": 2.0, "val/mAP_50_95": 0.3},
    ]
    draw_history(rows, tmp_path / "full.png")
    draw_history([], tmp_path / "empty.png")
    with (
        Image.open(tmp_path / "full.png") as full,
        Image.open(tmp_path / "empty.png") as empty,
    ):
        assert full.size == empty.size
        drawn = [np.asarray(picture.convert("RGB")) for picture in (full, empty)]
    half = drawn[0].shape[1] // 2
    changed = (drawn[0] != drawn[1]).any(axis=-1)
    assert changed[:, :half].any()
    assert changed[:, half:].any()


def test_names_are_distinct_and_unnamed_labels_keep_their_number():
    names = ["cat", "dog", "cat", None]
    assert report.class_labels(names, [0, 1, 2, 3, 9]) == ["cat_0", "dog", "cat_2", "3", "9"]
    assert report.class_labels(None, [4]) == ["4"]
    assert report.class_labels({7: "seven"}, [7, 8]) == ["seven", "8"]
    assert report.named_labels(["cat", None, "dog"]) == [0, 2]


def test_table_says_which_limit_each_column_has(evaluation):
    result, _, _ = evaluation
    console = Console(width=250)
    with console.capture() as captured:
        console.print(report.summary_table(result, "Test"))
    text = captured.get()
    assert "500 detections (as in training)" in text
    assert "100 detections (COCO standard)" in text
    assert f"{result.bbox.summary.ap:.4f}" in text
    assert "mAR at the limit" in text


@pytest.mark.parametrize("count", [1, 3, 300])
def test_bars_of_the_lowest_classes(count: int, tmp_path: Path) -> None:
    precision = {f"class {number} of {'long ' * 9}": number / count for number in range(count)}
    draw_class_precision(precision, tmp_path / "bars.png")
    pixels = np.asarray(Image.open(tmp_path / "bars.png").convert("RGB")).astype(int)
    bars = (np.abs(pixels - (31, 119, 180)).max(axis=2) < 20).any(axis=1)  # matplotlib's first blue
    assert pixels.shape[0] < 1100
    assert (np.diff(bars.astype(int)) == 1).sum() == min(count, 40) - 1  # one has no length
