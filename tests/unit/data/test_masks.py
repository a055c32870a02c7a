from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from rfdetr.data.masks import encode, mask_areas, rasterise, to_rle
from rfdetr.errors import DatasetError


def drawings() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    masks = [rng.random((h, w)) < 0.5 for h, w in rng.integers(1, 40, (20, 2))]
    masks += [np.kron(m, np.ones((9, 7))) > 0 for m in masks[:10]]
    return [*masks, np.zeros((5, 4), bool), np.ones((300, 400), bool)]


@pytest.mark.parametrize("form", ["text", "bytes", "counts"])
def test_run_lengths(form: str) -> None:
    for mask in drawings():
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        counts: Any = rle["counts"].decode()
        if form == "counts":
            flat = mask.ravel(order="F").astype(int)
            edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
            counts = np.diff([0, *edges, flat.size]).tolist()
        elif form == "bytes":
            assert to_rle({"size": list(mask.shape), "counts": counts}, *mask.shape) == rle
        found = rasterise({"size": list(mask.shape), "counts": counts}, *mask.shape)
        np.testing.assert_array_equal(found, mask)


def test_union_of_polygons_and_what_is_skipped() -> None:
    square, other = [1, 1, 5, 1, 5, 5, 1, 5], [4, 4, 8, 4, 8, 8, 4, 8]
    union = rasterise([square], 10, 12) | rasterise([other], 10, 12)
    np.testing.assert_array_equal(rasterise([square, other], 10, 12), union)
    np.testing.assert_array_equal(
        rasterise([square, [1, 2, 3, 4], []], 10, 12), rasterise([square], 10, 12)
    )
    assert rasterise([[-1e12, -1e12, 1e12, -1e12, 1e12, 1e12, -1e12, 1e12]], 10, 12).all()
    assert not rasterise(None, 10, 12).any()
    assert not rasterise([], 10, 12).any()


@pytest.mark.parametrize(
    "segmentation",
    [
        "abc",
        7,
        [[1, 2, "x", 4, 5, 6]],
        [[1, 2, None, 4, 5, 6]],
        [[[1, 2], [3, 4], [5, 6]]],
        [[float("nan")] * 6],
        [1, 2, 3, 4, 5, 6],
        {"size": [10, 12]},
        {"size": [12, 10], "counts": [120]},
        {"size": [10, 12], "counts": [119]},
        {"size": [10, 12], "counts": [-1, 121]},
        {"size": [10, 12], "counts": [60.5, 59.5]},
        {"size": [10, 12], "counts": "oooooooooooooo"},
        {"size": [10, 12], "counts": "\x01"},
        {"size": [10, 12], "counts": "ü"},
        {"size": [10, 12], "counts": "P" * 14 + "0"},  # more than 64 bits
        {"size": [10, 12], "counts": "P"},  # ends within a number
        {},
    ],
)
def test_nonsense_is_refused(segmentation: Any) -> None:
    with pytest.raises(DatasetError):
        rasterise(segmentation, 10, 12)


@pytest.mark.parametrize("count", [0, 1, 255, 256, 700])
def test_areas_of_any_number_of_masks(count: int) -> None:
    rng = np.random.default_rng(count)
    sides = [(300, 400), *rng.integers(1, 40, (max(0, count - 1), 2)).tolist()][:count]
    masks = [rng.random(side) < rng.random() for side in sides]
    masks = [np.ones_like(mask) if mask.size > 65_535 else mask for mask in masks]
    areas = mask_areas([encode(mask) for mask in masks])
    assert areas.dtype == np.float64
    np.testing.assert_array_equal(areas, [mask.sum() for mask in masks])


def test_integers_of_rle_may_be_written_as_floats() -> None:
    mask = rasterise({"size": [10.0, 12.0], "counts": [60.0, 60.0]}, 10, 12)
    assert mask[:, 6:].all() and not mask[:, :6].any()


@pytest.mark.parametrize(
    ("polygon", "words"),
    [
        ([1, 1, 5, 1, 5, 5, 1], "7 numbers, an odd count"),
        ([1, 1, 5, 1, 5, float("nan")], "finite numbers"),
        (["1", "1", "5", "1", "5", "5"], "finite numbers"),
        ([True, 1, 5, 1, 5, 5], "finite numbers"),
        ([10**400, 1, 5, 1, 5, 5], "finite numbers"),
    ],
)
def test_a_polygon_of_anything_but_pairs_of_numbers_is_refused(polygon: Any, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        to_rle([[1, 1, 5, 1, 5, 5], polygon], 8, 8)
