"""Speed and memory of the annotation checks on a file as large as COCO train2017.

    python tests/benchmarks/bench_checks.py [--file PATH]

Prints the times of `pycocotools.COCO(file)` and of `check_dataset` (annotations only) in one
process and with all cores, with the ratios. Seconds are wall time and processor time of all
processes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench_data import ANNOTATIONS, IMAGES, large_file


class Cost(NamedTuple):
    """Seconds and peak memory of one task in a fresh process and its children."""

    wall: float
    processor: float
    peak_gb: float


def load_with_pycocotools(path: Path) -> None:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        COCO(str(path))


def check_in_one_process(path: Path) -> None:
    _check(path, 1)


def check_on_all_cores(path: Path) -> None:
    _check(path, None)


def _check(path: Path, workers: int | None) -> None:
    from rfdetr.checks import CheckConfig, check_dataset

    with tempfile.TemporaryDirectory() as folder:
        annotations = Path(folder) / "annotations"
        annotations.mkdir()
        (annotations / "instances_train2017.json").symlink_to(path.absolute())
        config = CheckConfig(check_images=False)
        report = check_dataset(folder, "coco", config=config, workers=workers, progress=False)
    numbers = report.statistics["train"]
    found = numbers.images, numbers.boxes + numbers.crowd_regions
    assert found == (IMAGES, ANNOTATIONS), found


def measure(task: Callable[[Path], None], path: Path) -> Cost:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, task, path).result()


def _measured(task: Callable[[Path], None], path: Path) -> Cost:
    start = time.perf_counter()
    task(path)
    wall = time.perf_counter() - start
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = sum(u.ru_utime + u.ru_stime for u in (own, children))
    return Cost(wall, used, own.ru_maxrss / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--file", type=Path)
    path = large_file(parser.parse_args().file)
    path.read_bytes()  # into the page cache
    size = path.stat().st_size / 1e6
    print(f"{path.name}: {IMAGES:,} images, {ANNOTATIONS:,} annotations, {size:.0f} MB")
    base = measure(load_with_pycocotools, path)
    print(
        f"pycocotools.COCO: {base.wall:.1f} s wall, {base.processor:.1f} s processor, "
        f"{base.peak_gb:.2f} GB"
    )
    for name, task in (("one process", check_in_one_process), ("all cores", check_on_all_cores)):
        cost = measure(task, path)
        print(
            f"checks, {name}: {cost.wall:.1f} s wall ({base.wall / cost.wall:.1f}x), "
            f"{cost.processor:.1f} s processor ({base.processor / cost.processor:.1f}x), "
            f"{cost.peak_gb:.2f} GB peak"
        )


if __name__ == "__main__":
    main()
