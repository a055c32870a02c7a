"""Find planted label mistakes in the demo's test split. Prints one JSON object.

    rfdetr-pipeline evaluate && python tests/benchmarks/bench_labels.py --project .

5 % of the labels get another class, are deleted, or are moved by 0.3 to 0.6 of their size. The
recall is the share of them among as many suspects as mistakes: `alone` with one kind of mistake,
`together` with all three. `seconds_per_5000_images` repeats the split until it has 5,000 images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from rfdetr.arrays import Integers
from rfdetr.evaluation.box_table import EvaluationData, concatenate, data_from_coco
from rfdetr.evaluation.matching import box_iou
from rfdetr.evaluation.suspects import find_suspects

KINDS = ("swap", "delete", "shift")


def plant(
    data: EvaluationData, kinds: tuple[str, ...], share: float, seed: int
) -> tuple[EvaluationData, dict[str, Integers], Integers]:
    """The data with mistakes, the rows of each kind, and the old row of every label."""
    rng = np.random.default_rng(seed)
    truth, classes = data.truth, np.unique(data.truth.label)
    count = round(share * len(truth))
    order = rng.permutation(len(truth))
    rows = {kind: order[i * count : (i + 1) * count] for i, kind in enumerate(kinds)}
    label, box, kept = truth.label.copy(), truth.box.copy(), np.ones(len(truth), dtype=bool)
    for row in rows.get("swap", ()):
        label[row] = rng.choice(classes[classes != label[row]])
    if "shift" in rows:
        angle, distance = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.3, 0.6, count)
        moves = np.stack([np.cos(angle), np.sin(angle)], axis=1) * distance[:, None]
        box[rows["shift"], :2] += moves * box[rows["shift"], 2:]
    kept[rows.get("delete", [])] = False
    changed = dataclasses.replace(truth, label=label, box=box).take(kept)
    return dataclasses.replace(data, truth=changed), rows, np.flatnonzero(kept)


def recall(data: EvaluationData, kinds: tuple[str, ...], share: float, seed: int) -> list[float]:
    """Share of the mistakes of each kind that are among the first suspects."""
    changed, rows, old = plant(data, kinds, share, seed)
    found = find_suspects(changed)
    first = range(min(len(found), sum(map(len, rows.values()))))
    labels = {int(old[found.truth[i]]) for i in first if found.truth[i] >= 0}
    missing = [i for i in first if found.truth[i] < 0]

    def is_found(kind: str, row: int) -> bool:
        if kind != "delete":
            return row in labels
        box, no_crowd = data.truth.box[row][None], np.zeros(1, dtype=bool)
        return any(
            found.image[i] == data.truth.image[row]
            and box_iou(data.detections.box[found.detection[i]][None], box, no_crowd)[0] >= 0.5
            for i in missing
        )

    return [float(np.mean([is_found(kind, int(row)) for row in rows[kind]])) for kind in kinds]


def seconds(data: EvaluationData) -> float:
    """Time of `find_suspects` on 5,000 images."""
    step = int(data.image_ids.max()) + 1
    copies = [
        dataclasses.replace(data, image_ids=data.image_ids + step * number)
        for number in range(-(-5000 // len(data.image_ids)))
    ]
    many = concatenate(copies)
    started = time.perf_counter()
    find_suspects(many)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    truth = options.project / "data" / "demo" / "test" / "_annotations.coco.json"
    detections = options.project / "reports" / "detections.json"
    data = data_from_coco(json.loads(truth.read_text()), json.loads(detections.read_text()))

    def mean(kinds: tuple[str, ...]) -> dict[str, float]:
        runs = [recall(data, kinds, options.share, seed) for seed in range(options.repeats)]
        return dict(zip(kinds, np.mean(runs, axis=0).round(3).tolist(), strict=True))

    alone = {kind: mean((kind,))[kind] for kind in KINDS}
    record = {
        "labels": len(data.truth),
        "alone": alone,
        "together": mean(KINDS),
        "seconds_per_5000_images": round(seconds(data), 2),
    }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
