"""Find planted label mistakes in the demo. Prints one JSON object.

    rfdetr-pipeline fit && python -m tests.benchmarks.bench_labels --project .
    pip install --target FOLDER cleanlab==2.9.0 hotcoco==1.3.0   # for the comparison
    python -m tests.benchmarks.bench_labels --project . --others FOLDER

5 % of the labels get another class, are deleted, or are moved by 0.3 to 0.6 of their size. The
recall is the share of them among as many suspects as mistakes: `together` with all three kinds
planted, `alone` with one of them, `alone_by_kind` among the suspects of this kind only, which is
what the detections allow. `seconds_per_5000_images` repeats the split until it has 5,000 images.
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
from typing import Any

import numpy as np

from flows.config.sections import DatasetSettings, EvaluateSettings
from rfdetr.arrays import Integers
from rfdetr.evaluation.box_table import EvaluationData, concatenate
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
    data: EvaluationData,
    ranking: Callable[[EvaluationData], Ranking],
    share: float,
    seed: int,
    kinds: tuple[str, ...] = KINDS,
) -> list[float]:
    """Share of the mistakes of each kind that are first in the ranking of their own kind."""
    changed, rows, old = plant(data, kinds, share, seed)
    found = ranking(changed)
    first = {kind: found[kind][: len(rows[kind])] for kind in kinds}
    return [
        _share(data, kind, rows[kind], first[kind] if kind == "delete" else old[first[kind]])
        for kind in kinds
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


def columns_of(project: Path, split: str) -> EvaluationData:
    """The labels of a split of the demo, and the detections of the project's trained model."""
    from flows.gate.scoring import score_model

    settings = EvaluateSettings(pictures=0).model_copy(update={"split": split})
    weights, data = project / "models/trained/model.pth", project / "data/demo"
    return score_model(weights, data, DatasetSettings(), settings).columns


def recalls(data: EvaluationData, share: float, seeds: range) -> dict[str, Any]:
    """The number of labels, and the recall of each kind in the three ways."""
    together = [recall(data, KINDS, share, seed) for seed in seeds]
    alone = [[recall(data, (k,), share, seed)[0] for k in KINDS] for seed in seeds]
    by_kind = [[recall_by_kind(data, by_us, share, seed, (k,))[0] for k in KINDS] for seed in seeds]
    ways = {"together": together, "alone": alone, "alone_by_kind": by_kind}
    return {"labels": len(data.truth)} | {
        way: dict(zip(KINDS, np.mean(runs, axis=0).round(3).tolist(), strict=True))
        for way, runs in ways.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--splits", nargs="+", default=["test", "valid"])
    parser.add_argument("--others", type=Path, help="folder with cleanlab and hotcoco")
    options = parser.parse_args()
    seeds = range(options.repeats)
    splits = {split: columns_of(options.project, split) for split in options.splits}
    record: dict[str, Any] = {
        split: recalls(data, options.share, seeds) for split, data in splits.items()
    }
    data = next(iter(splits.values()))
    record["seconds_per_5000_images"] = round(seconds(data), 2)
    if options.others:
        sys.path.append(str(options.others))

        def by_kind(ranking: Callable[[EvaluationData], Ranking]) -> list[float]:
            runs = [recall_by_kind(data, ranking, options.share, seed) for seed in seeds]
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
