from __future__ import annotations

import json
import random
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from rfdetr.checks import check_dataset
from rfdetr.checks.inspection import in_forks
from rfdetr.checks.polygons import joined, measure_segmentations, rle_problem
from rfdetr.config import ModelConfig, RFDETRNanoConfig, RFDETRSegNanoConfig
from rfdetr.data import coco_annotations
from rfdetr.data.coco_json import CocoFile, read_coco
from tests.datasets import make_roboflow


def texts_of(values: list[object], indent: int | None) -> list[bytes]:
    return [json.dumps(value, indent=indent).encode() for value in values]


def random_segmentations(count: int, seed: int) -> list[object]:
    rng = random.Random(seed)

    def ring() -> list[float]:
        return [round(rng.uniform(-5, 99), rng.choice((0, 2))) for _ in range(rng.randrange(0, 15))]

    return [[ring() for _ in range(rng.randint(1, 3))] for _ in range(count)]


@pytest.mark.parametrize("indent", [None, 1])
def test_extents_equal_a_plain_loop(indent: int | None) -> None:
    values = random_segmentations(300, 3)
    found = measure_segmentations(texts_of(values, indent)).polygons
    rings = [(i, ring) for i, value in enumerate(values) for ring in value]  # type: ignore[attr-defined]
    assert found.owner.tolist() == [i for i, _ in rings]
    assert found.numbers.tolist() == [len(ring) for _, ring in rings]
    for k, (_, ring) in enumerate(rings):
        points = np.array(ring[: len(ring) // 2 * 2]).reshape(-1, 2)
        low = points.min(axis=0) if len(points) else [np.nan, np.nan]
        high = points.max(axis=0) if len(points) else [np.nan, np.nan]
        np.testing.assert_array_equal(found.low[k], low)
        np.testing.assert_array_equal(found.high[k], high)


def test_odd_things_do_not_hide_their_neighbours() -> None:
    values: list[object] = random_segmentations(40, 4)
    values[3] = {"size": [4, 4], "counts": [16]}
    values[5], values[6], values[7] = "text", [1, 2, 3, 4, 5, 6], [["x", 1]]
    values[9], values[10] = None, []
    texts = texts_of(values, None)
    texts[11] = b""
    found = measure_segmentations(texts)
    assert sorted(row for row, _ in found.wrong) == [5, 6, 7]
    assert [row for row, _ in found.masks] == [3]
    owners = set(found.polygons.owner.tolist())
    assert owners == set(range(40)) - {3, 5, 6, 7, 9, 10, 11}


def large_document(count: int) -> dict[str, object]:
    """Polygons, masks, plain boxes, wrong segmentations and odd spellings of each."""
    rng = random.Random(5)
    odd: list[object] = [{"size": [9, 9], "counts": [81]}, "text", None, [], [[1, 2, "x"]]]
    odd.append([[0, 0, 8, 0, True, 8]])
    shapes = random_segmentations(count, 5)
    rows: list[dict[str, object]] = []
    for number, shape in enumerate(shapes):
        row = {"id": number, "image_id": number % 7, "category_id": 1, "bbox": [1, 2, 3.5, 4]}
        if rng.random() < 0.9:
            row["segmentation"] = rng.choice(odd) if rng.random() < 0.05 else shape
        if rng.random() < 0.1:
            row |= {"iscrowd": 1, "area": 7.25}
        rows.append(row)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(7)]
    return {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "a"}]}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("place", ["last", "first", "nested", "text", "broken"])
def test_parts_and_processes_give_what_one_piece_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, place: str
) -> None:
    document = large_document(600)
    rows: list[dict[str, object]] = document["annotations"]  # type: ignore[assignment]
    if place == "first":
        document = {"annotations": rows, **document}
    elif place == "nested":  # a part may end in the inner list
        rows[300]["attributes"] = [{"a": [1]}, {"b": {}}, {"c": 1}] * 400
    elif place == "text":
        document = {"info": '"annotations": [{}, {"bbox": 1}], {', **document}
        rows[300]["note"] = '}, {"id": 1}, {' * 400
    elif place == "broken":
        rows[300]["bbox"] = [1, 2]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document, indent=indent))

    def read(part: int, workers: int) -> CocoFile:
        monkeypatch.setattr(coco_annotations, "PART", part)
        run = partial(in_forks, workers=workers)
        return read_coco(path, tolerant=True, measure=measure_segmentations, run=run)

    whole, parts, forked = read(10**9, 1), read(4096, 1), read(4096, 2)
    texts = [bytes(text) for text in whole.texts]
    assert len(texts) == 600 - (place == "broken")
    for coco in (parts, forked):
        assert [bytes(text) for text in coco.texts] == texts
        assert (coco.problems, coco.images.names) == (whole.problems, whole.images.names)
        for column in fields(coco.annotations):
            found, expected = (getattr(c.annotations, column.name) for c in (coco, whole))
            np.testing.assert_array_equal(found, expected)
        measured, expected = joined(coco.measured), joined(whole.measured)
        assert (measured.masks, measured.wrong) == (expected.masks, expected.wrong)
        for name in ("owner", "numbers", "low", "high"):
            values = getattr(measured.polygons, name), getattr(expected.polygons, name)
            np.testing.assert_array_equal(*values)
    assert (len(parts.measured) > 20) == (place in ("last", "first"))


def test_compressed_masks_are_understood_as_pycocotools_writes_them() -> None:
    rng = np.random.default_rng(0)
    for density in (0.02, 0.5, 0.98):
        mask = np.asfortranarray(rng.random((37, 53)) < density, np.uint8)
        encoded = coco_mask.encode(mask)
        text = encoded["counts"].decode()
        assert rle_problem({"size": [37, 53], "counts": text}, 53, 37) is None
        assert rle_problem({"size": [37, 53], "counts": text}, 37, 53) is not None
        assert rle_problem({"size": [37, 54], "counts": text}, 54, 37) is not None
        assert rle_problem({"size": [37, 53], "counts": text[:-1]}, 53, 37) is not None


def test_a_malformed_segmentation_is_an_error_only_where_training_reads_it(tmp_path: Path) -> None:
    root = make_roboflow(tmp_path / "data", splits={"train": 4, "valid": 2}, segmentation=True)
    path = root / "train/_annotations.coco.json"
    document = json.loads(path.read_text())
    first, second = document["annotations"][:2]
    first["segmentation"] = [[1, 1, 5, 5, 7]]
    second |= {"segmentation": {"size": [1, 1], "counts": [5]}, "iscrowd": 1}
    path.write_text(json.dumps(document))

    def levels(model: ModelConfig) -> dict[str, str]:
        report = check_dataset(
            root, model_config=model, workers=1, cache_dir=tmp_path / "cache", progress=False
        )
        found = report.of("polygon-malformed", "rle-malformed")
        assert report.errors == sum(finding.severity == "error" for finding in report.findings)
        return {finding.code: finding.severity for finding in found}

    weights = {"pretrain_weights": None}
    expected = {"polygon-malformed": "error", "rle-malformed": "warning"}
    assert levels(RFDETRSegNanoConfig.model_validate(weights)) == expected
    expected["polygon-malformed"] = "warning"
    assert levels(RFDETRNanoConfig.model_validate(weights)) == expected
