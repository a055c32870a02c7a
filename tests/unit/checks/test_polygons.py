from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from rfdetr.checks import check_dataset, polygons
from rfdetr.checks.polygons import Segmentations, measure_segmentations, rle_problem
from rfdetr.config import ModelConfig, RFDETRNanoConfig, RFDETRSegNanoConfig
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
    found = measure_segmentations(texts_of(values, indent), 1)().polygons
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
    found = measure_segmentations(texts, 1)()
    assert sorted(row for row, _ in found.wrong) == [5, 6, 7]
    assert [row for row, _ in found.masks] == [3]
    owners = set(found.polygons.owner.tolist())
    assert owners == set(range(40)) - {3, 5, 6, 7, 9, 10, 11}


def test_processes_give_what_one_process_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygons, "CHUNK", 16)
    texts = texts_of(random_segmentations(200, 5), None)
    alone = measure_segmentations(texts, 1)()
    monkeypatch.setattr(polygons, "PARALLEL_FROM", 10)
    wait = measure_segmentations(texts, 2)
    together: Segmentations = wait()
    for name in ("owner", "numbers", "low", "high"):
        expected = getattr(alone.polygons, name)
        np.testing.assert_array_equal(getattr(together.polygons, name), expected)


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
