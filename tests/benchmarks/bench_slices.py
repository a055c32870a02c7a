"""What 20 slices and the intervals cost on a job of the size of COCO val2017 (5,000 images).

    python -m tests.benchmarks.bench_slices [--scale 0.2] [--network-ms 10]

The metrics are what the stage does with the detections of a test split: numbers, confusion matrix,
matches per image, and writing their record. The network comes on top: 5,000 images of
`--network-ms` each. Ratios are of alternating runs.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from rfdetr.evaluation.box_table import data_from_coco
from rfdetr.evaluation.evaluator import evaluate
from rfdetr.evaluation.evidence import EVERY_AREA, collect_evidence, evidence_by_area
from rfdetr.evaluation.slice_rules import parse_rule
from rfdetr.evaluation.slices import SplitImages, area_ranges, score_slices
from tests.benchmarks.bench_eval import make_job

RULES = {"site": "path:(?P<site>[^/]+)/", "night": "path:night", "odd": r"path:[13579]\.jpg"}
SITES = 17  # with night, odd and small: 20 slices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--network-ms", type=float, default=10.0)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    document, results = make_job(options.scale)
    data, ids = data_from_coco(document, results), [c["id"] for c in document["categories"]]
    names = [
        f"site{i % SITES}/{'night' if i % 3 else 'day'}-{i}.jpg" for i in range(len(data.image_ids))
    ]
    images = SplitImages(names, names, [])
    rules = [parse_rule(name, text) for name, text in {**RULES, "small": "area<32**2"}.items()]
    accepted = data.detections.score >= 0.4
    areas = area_ranges(rules)
    plain, more = [], []
    for _ in range(options.runs):
        start = time.perf_counter()
        evaluate(data, ids)
        evidence = collect_evidence(data, ids, accepted=accepted)
        evidence.encode()
        middle = time.perf_counter()
        evidence_by_area(data, ids, [EVERY_AREA], accepted=accepted)
        before = time.perf_counter()
        evidence, *by_area = evidence_by_area(data, ids, [EVERY_AREA, *areas], accepted=accepted)
        slices = score_slices(rules, images, evidence, by_area)
        end = time.perf_counter()
        plain.append(middle - start)
        more.append((end - before) - (before - middle))
    network = len(names) * options.network_ms / 1000
    metrics, added = float(np.median(plain)), float(np.median(more))
    print(f"{len(names)} images, {len(data.detections)} detections, {len(slices)} slices")
    print(f"metrics {metrics:.2f} s, slices {added:.2f} s: {100 * added / metrics:.1f} %")
    print(
        f"with the network at {options.network_ms:g} ms: {100 * added / (metrics + network):.1f} %"
    )


if __name__ == "__main__":
    main()
