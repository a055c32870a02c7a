"""Find planted label mistakes in the demo's test split. Prints one JSON object.

    rfdetr-pipeline evaluate && python -m tests.benchmarks.bench_labels --project .
    pip install --target FOLDER cleanlab==2.9.0 hotcoco==1.3.0   # for the comparison
    python -m tests.benchmarks.bench_labels --project . --others FOLDER

5 % of the labels get another class, are deleted, or are moved by 0.3 to 0.6 of their size. The
recall is the share of them among as many suspects as mistakes: `alone` with one kind of mistake,
`together` with all three. `seconds_per_5000_images` repeats the split until it has 5,000 images.
`by_kind` compares rankings of one kind each on the same detections, all three kinds planted; the
other tools with the confidence, of several, that serves them best.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from rfdetr.arrays import Integers
from rfdetr.evaluation.box_table import EvaluationData, concatenate, data_from_coco
from rfdetr.evaluation.matching import box_iou
from rfdetr.evaluation.suspects import find_suspects
from tests.benchmarks.label_oracles import Ranking, by_cleanlab, by_hotcoco, by_us

KINDS = ("swap", "delete", "shift")
CONFIDENT = (0.05, 0.1, 0.2, 0.3, 0.5, 0.95)


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
    first = slice(sum(map(len, rows.values())))
    truth, detection = found.truth[first], found.detection[first]
    labels, missing = old[truth[truth >= 0]], detection[truth < 0]
    return [
        _share(data, kind, rows[kind], missing if kind == "delete" else labels) for kind in kinds
    ]


def _share(data: EvaluationData, kind: str, rows: Integers, suspects: Integers) -> float:
    """Share of the labels `rows` among suspected labels, or if deleted, under detections."""
    if kind != "delete":
        return float(np.isin(rows, suspects).mean())
    truth, found = data.truth, data.detections.take(suspects)
    hits = []
    for row in rows:
        near = found.box[found.image == truth.image[row]]
        same = np.repeat(truth.box[row][None], len(near), axis=0)
        hits.append((box_iou(near, same, np.zeros(len(near), dtype=bool)) >= 0.5).any())
    return float(np.mean(hits))


def recall_by_kind(
    data: EvaluationData, ranking: Callable[[EvaluationData], Ranking], share: float, seed: int
) -> list[float]:
    """Share of the mistakes of each kind that are first in the ranking of their own kind."""
    changed, rows, old = plant(data, KINDS, share, seed)
    found = ranking(changed)
    first = {kind: found[kind][: len(rows[kind])] for kind in KINDS}
    return [
        _share(data, kind, rows[kind], first[kind] if kind == "delete" else old[first[kind]])
        for kind in KINDS
    ]


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
    parser.add_argument("--others", type=Path, help="folder with cleanlab and hotcoco")
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
    if options.others:
        sys.path.append(str(options.others))

        def by_kind(ranking: Callable[[EvaluationData], Ranking]) -> list[float]:
            runs = [
                recall_by_kind(data, ranking, options.share, seed)
                for seed in range(options.repeats)
            ]
            return np.mean(runs, axis=0).round(3).tolist()

        rows = {"this package": by_kind(by_us)}
        for name, other in (("cleanlab", by_cleanlab), ("hotcoco", by_hotcoco)):
            tried = [by_kind(partial(other, confident=value)) for value in CONFIDENT]
            rows[name] = np.max(tried, axis=0).tolist()
        record["by_kind"] = {
            name: dict(zip(KINDS, values, strict=True)) for name, values in rows.items()
        }
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
