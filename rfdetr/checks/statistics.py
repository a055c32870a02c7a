"""Statistics of each split: counts, imbalance, box sizes at the model's resolution, colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.checks.check_boxes import input_sides
from rfdetr.checks.check_categories import counts_by_name
from rfdetr.checks.check_files import SplitFiles
from rfdetr.checks.collector import Collector
from rfdetr.checks.dataset_report import SplitStatistics
from rfdetr.checks.options import CheckConfig
from rfdetr.checks.table import SplitTable
from rfdetr.config import ModelConfig

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
SIDE_EDGES = (0, 4, 8, 16, 32, 64, 128, 256, 512)
COMMON_SIZES = 4  # image sizes that are counted one by one
COUNT_EDGES = (0, 1, 2, 3, 5, 10, 20, 50, 100, 300)


def split_statistics(
    files: SplitFiles, names: Sequence[str], model: ModelConfig
) -> SplitStatistics:
    """Statistics of one split; crowd regions are counted separately."""
    table = files.table
    kept = _kept(table)
    per_image = np.bincount(table.image_rows[kept], minlength=len(table.file_names))
    counts = counts_by_name(table)
    filled = [counts.get(name, 0) for name in names if counts.get(name, 0)]
    resized = input_sides(table, model.resolution)
    known = table.sizes[np.isfinite(table.sizes).all(axis=1)]
    sizes = Counter(zip(*known.T.tolist(), strict=True)).most_common(COMMON_SIZES)
    sides = np.sqrt(np.clip(resized, 0, None).prod(axis=1))
    sides = sides[kept & np.isfinite(sides)]
    return SplitStatistics(
        images=len(table.file_names),
        images_without_boxes=int((per_image == 0).sum()),
        boxes=int(kept.sum()),
        crowd_regions=int(table.crowd.sum()),
        boxes_per_image=_histogram(per_image, COUNT_EDGES),
        boxes_per_image_mean=round(float(per_image.mean()), 4) if len(per_image) else 0.0,
        boxes_per_image_max=int(per_image.max(initial=0)),
        class_counts={name: counts.get(name, 0) for name in names},
        imbalance=round(max(filled) / min(filled), 4) if filled else None,
        box_side_histogram=_histogram(sides, SIDE_EDGES),
        box_side_percentiles=_percentiles(sides),
        boxes_below_patch=int((sides < model.patch_size).sum()),
        colour_mean=_colour_mean(files),
        image_sizes={f"{width:.0f} x {height:.0f}": count for (width, height), count in sizes},
        other_image_sizes=len(known) - sum(count for _, count in sizes),
        median_box=_median(table.boxes[:, 2:][kept]),
        median_box_input=_median(resized[kept]),
    )


def _kept(table: SplitTable) -> Bools:
    return np.asarray(~table.crowd & (table.image_rows >= 0))


def _histogram(values: npt.NDArray[Any], edges: Sequence[int]) -> dict[str, int]:
    """Counts per half-open range; a range that contains one integer is labelled with it."""
    labels = [
        str(low) if high - low == 1 and values.dtype.kind == "i" else f"{low}-{high}"
        for low, high in pairwise(edges)
    ]
    labels.append(f">={edges[-1]}")
    place = np.searchsorted(np.array(edges), values, "right") - 1
    counts = np.bincount(place[place >= 0], minlength=len(edges))
    return dict(zip(labels, counts.tolist(), strict=True))


def _median(sizes: Floats) -> tuple[float, float] | None:
    """Median width and height of boxes (n, 2), of those whose size is known."""
    sizes = sizes[np.isfinite(sizes).all(axis=1)]
    if not len(sizes):
        return None
    width, height = np.median(sizes, axis=0).round(2).tolist()
    return width, height


def _percentiles(values: Floats) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.percentile(values, PERCENTILES)
    return {f"p{p}": round(float(v), 2) for p, v in zip(PERCENTILES, found, strict=True)}


def _colour_mean(files: SplitFiles) -> tuple[float, float, float] | None:
    means = [found.facts.mean for _, found in files.usable() if found.facts.mean]
    if not means:
        return None
    red, green, blue = np.mean(means, axis=0).round(2).tolist()
    return red, green, blue


def check_shares(
    table: SplitTable, numbers: SplitStatistics, collector: Collector, config: CheckConfig
) -> None:
    """Report a large share of images without boxes."""
    if not numbers.images or not numbers.boxes:
        return
    share = numbers.images_without_boxes / numbers.images
    if share > config.max_empty_share:
        text = f"{share:.1%} of the images in {table.name} have no boxes"
        collector.add("share-empty", text, split=table.name)


def fingerprints(files: SplitFiles) -> dict[str, tuple[str, str]]:
    """File name -> (content hash, hash of its boxes), for comparing versions of a dataset."""
    table = files.table
    digests = _box_digests(table)
    hashes = (found.hash[:32] if found else "" for found in files.facts)
    rows = zip(table.file_names, zip(hashes, digests, strict=True), strict=True)
    return dict(sorted(dict(rows).items()))


def _box_digests(table: SplitTable) -> list[str]:
    """One hash per image of its categories and boxes, to a tenth of a pixel.

    The hashes of the rows are added up, so that the order of rows does not matter.
    """
    kept = np.flatnonzero(table.image_rows >= 0)
    boxes = np.nan_to_num(table.boxes[kept], nan=-1e9, posinf=1e9, neginf=-1e9)
    values = np.rint(np.clip(boxes, -1e9, 1e9) * 10).astype(np.int64)
    ids: Integers = np.array([category.id for category in table.categories] + [-1], np.int64)
    columns = [ids[table.category_rows[kept]], *values.T]
    state = np.full(len(kept), 0x9E3779B97F4A7C15, np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            state = _mix(state ^ column.astype(np.uint64))
        sums = np.zeros(len(table.file_names), np.uint64)
        np.add.at(sums, table.image_rows[kept], state)
    text = sums.astype(">u8").tobytes().hex()
    return [text[i : i + 16] for i in range(0, len(text), 16)]


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
