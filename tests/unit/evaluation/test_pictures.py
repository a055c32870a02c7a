"""Pictures and tables of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from rfdetr.evaluation import report
from rfdetr.evaluation.coco import evaluate
from rfdetr.evaluation.columns import columns_from_coco
from rfdetr.evaluation.plots import TRUTH_COLOUR, Sample, draw_evaluation, sample_sheet
from tests.unit.evaluation.random_sets import random_set


@pytest.fixture(params=["bbox", "segm"])
def evaluation(request):
    masks = request.param == "segm"
    document, results = random_set(4, masks=masks)
    columns = columns_from_coco(document, results, masks=masks)
    kinds = ("bbox", "segm") if masks else ("bbox",)
    result = evaluate(columns, [c["id"] for c in document["categories"]], iou_types=kinds)
    side = document["images"][0]["height"]
    samples = [
        Sample(image["id"], np.full((40, 40, 3), 200, dtype=np.uint8), (side, side))
        for image in document["images"][:4]
    ]
    return result, columns, samples


def test_pictures_are_small_png_files(evaluation, tmp_path):
    result, columns, samples = evaluation
    names = ["a/b", "cost $x$ and $y", "日本語", "plain", "more"][: len(result.class_ids)]
    pictures = draw_evaluation(result, columns, names, samples, tmp_path / "plots")
    assert set(pictures) == {"confusion_matrix", "precision_recall", "f1_threshold", "samples"}
    for path in pictures.values():
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 200
        assert path.stat().st_size < 150_000
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == sorted(
        p.name for p in pictures.values()
    )


def test_truth_and_detections_are_drawn_where_they_are(evaluation):
    result, columns, samples = evaluation
    names = [str(label) for label in result.class_ids]
    sheet = np.asarray(sample_sheet(result, columns, names, samples))
    owner = int(np.searchsorted(columns.image_ids, samples[0].image_id))
    rows = columns.truth.take((columns.truth.image == owner) & ~columns.truth.crowd)
    scale = 288 / samples[0].size[0]
    for x, y, w, h in rows.box * scale:
        edge = sheet[round(y + h) - 3 : round(y + h) + 3, round(x) + 1 : round(x + w) - 1]
        green = (abs(edge.astype(int) - TRUTH_COLOUR).sum(axis=-1) < 30).any()
        red = (edge[..., 0] > 200) & (edge[..., 1] < 60)
        assert green or red.any()


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
