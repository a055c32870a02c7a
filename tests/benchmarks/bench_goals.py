"""Every speed goal in one table: training steps, fit, validation, predict() and memory.

    python tests/benchmarks/bench_goals.py                      this package alone, on a GPU
    python tests/benchmarks/bench_goals.py --public /tmp/public/bin/python
    python tests/benchmarks/bench_goals.py --smoke              small, on a CPU: does it run?

This package runs eagerly, on CUDA graphs and compiled; so does the public one if --public gives a
Python (with arguments or `env NAME=VALUE` before it) that imports it. Each measurement is a process
of its own, in turns with the others; printed are medians of the rounds. Steps are those of a fit
at one size; `fit` is the second epoch of a fit with every default, images on disk. The last columns
are the ratios to the public package, eager and at its fastest: above 1 is in favour of this one,
for memory below 1. A cell says why it has no number. About 12 minutes a round on a GPU with
--public; --parts and --modes select.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from bench_run import TINY, make_data

ROOT = Path(__file__).parents[2]
WORKER = str(Path(__file__).with_name("goal_worker.py"))
MODES = ("eager", "graphs", "compile")


class Row(NamedTuple):
    """A line of the table: one number that some work measures."""

    title: str
    part: str
    variant: str
    batch: int
    key: str
    goal: str


STEPS = (
    (("nano", 4), ">= 2.0 eager, >= 1.2 fastest"),
    (("nano", 16), ">= 2.0 eager, >= 1.2 fastest"),
    (("medium", 8), ">= 2.0 eager"),
    (("seg-nano", 4), ">= 1.5 eager"),
)
ROWS = [
    *(Row("training step, ms", "step", *work, "step_ms", goal) for work, goal in STEPS),
    *(Row("peak memory of the step, MiB", "step", *w, "peak_mib", "<= 0.85") for w, _ in STEPS),
    Row("fit, img/s", "fit", "nano", 16, "fit_img_s", ">= 2.5 eager"),
    Row("validation with EMA, s", "fit", "nano", 16, "validation_s", ">= 1.5"),
    Row("predict, one image, ms", "predict", "nano", 1, "predict_ms", ">= 1.5"),
    Row("predict, 16 images, ms", "predict", "nano", 1, "predict_16_ms", ">= 1.5"),
]
Work = tuple[str, str, int]  # part, variant, batch
Cell = tuple[str, str]  # package, mode


def measure(work: Work, cell: Cell, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What one process prints, or why there is nothing under "error"."""
    (part, variant, batch), (package, mode) = work, cell
    python = shlex.split(args.public) if package == "public" else [sys.executable]
    command = [*python, "-W", "ignore", WORKER, part, "--variant", variant, "--mode", mode]
    command += ["--batch", str(batch), "--data", f"{folder}/data"]
    command += ["--output", f"{folder}/{package}-{part}-{variant}", "--workers", str(args.workers)]
    if args.smoke:
        fields = {"resolution": 96 if "seg" in variant else 128}
        command += ["--steps", "2", "--warmup", "1"]
        command += ["--fields", json.dumps(fields if package == "public" else TINY | fields)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" or package == "own"}
    if package == "own":
        environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=args.limit, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"error": f"over {args.limit} s"}
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines and lines[-1].startswith("{"):
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    reason = [*done.stderr.strip().splitlines(), f"status {done.returncode}"]
    print(f"{package} {mode} {part} {variant}:", *reason[-6:], sep="\n  ", file=sys.stderr)
    return {"error": "failed"}


def median(results: list[dict[str, Any]], key: str) -> float | None:
    numbers = [result[key] for result in results if key in result]
    return statistics.median(numbers) if numbers else None


def ratio(row: Row, own: float | None, other: float | None) -> str:
    """In favour of this package above 1; for memory, the share."""
    if own is None or other is None:
        return ""
    inverse = row.key in ("fit_img_s", "peak_mib")
    return f"{own / other if inverse else other / own:.2f}"


def line(row: Row, found: dict[tuple[Work, Cell], list[dict[str, Any]]], cells: list[Cell]) -> str:
    work = (row.part, row.variant, row.batch)
    numbers: dict[Cell, float | None] = {}
    texts = []
    for cell in cells:
        results = found.get((work, cell), [])
        numbers[cell] = median(results, row.key)
        number = numbers[cell]
        texts.append(f"{number:.1f}" if number else results[-1]["error"] if results else "")
    best = max if row.key == "fit_img_s" else min
    known = {p: [n for (q, _), n in numbers.items() if q == p and n] for p in ("own", "public")}
    # Graphs are the default on one GPU.
    own = numbers.get(("own", "graphs")) or numbers.get(("own", "eager"))
    fastest = best(known["public"], default=None)
    ratios = [ratio(row, own, numbers.get(("public", "eager"))), ratio(row, own, fastest)]
    batch = "" if row.part == "predict" else f", batch {row.batch}"
    return (
        "| " + " | ".join([f"{row.title}: {row.variant}{batch}", *texts, *ratios, row.goal]) + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--public", help="command of a Python that imports the public package")
    parser.add_argument("--parts", default="step,fit,predict")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=800, help="to train on; half to validate")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--limit", type=int, default=150, help="seconds for one measurement")
    parser.add_argument("--smoke", action="store_true", help="small, one round")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.images, args.workers = 1, 8, 0
    packages = ["own", "public"] if args.public else ["own"]
    cells = [(package, mode) for mode in args.modes.split(",") for package in packages]
    rows = [row for row in ROWS if row.part in args.parts.split(",")]
    if args.smoke:
        rows = list(dict.fromkeys(row._replace(batch=min(row.batch, 2)) for row in rows))
    works = list(dict.fromkeys((row.part, row.variant, row.batch) for row in rows))
    found: dict[tuple[Work, Cell], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder) / "data", args.images)
        for _ in range(args.rounds):
            for work in works:
                for cell in cells if work[0] != "predict" else cells[: len(packages)]:
                    result = measure(work, cell, args, folder)
                    found.setdefault((work, cell), []).append(result)
                    print(*work, *cell, json.dumps(result), file=sys.stderr, flush=True)
    devices = {r["device"] for results in found.values() for r in results if "device" in r}
    print(f"Device: {', '.join(sorted(devices)) or 'none'}; {args.rounds} rounds\n")
    if args.smoke:
        print("This package runs a tiny network here: the ratios mean nothing.\n")
    titles = ["What", *(f"{package}, {mode}" for package, mode in cells)]
    titles += ["ratio to eager", "to the fastest", "goal"]
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for row in rows:
        print(line(row, found, cells))


if __name__ == "__main__":
    main()
