"""The image checks beside cleanvision and imagededup, on the same files with planted defects.

    python tests/benchmarks/bench_image_checks.py [--images 1000]

The two packages are not dependencies of the project: install them in an environment of their own
that also has the project (`pip install cleanvision imagededup`). All tools use every core; the
runs alternate, and the fastest of each tool counts. The table says how many of the planted defects
each tool found, and how many unplanted pairs it called duplicates.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SIZE = (640, 480)
PLANTED = 20  # of each kind
Pairs = set[frozenset[str]]


class Found(NamedTuple):
    """Pairs of duplicates, and files that are dark or cannot be read."""

    pairs: Pairs
    dark: set[str]
    broken: set[str]


def build(root: Path, count: int) -> dict[str, list[tuple[str, str]]]:
    """Images of clouds and boxes in train, copies in valid; the planted pairs and files by kind."""
    rng = np.random.default_rng(0)
    for split in ("train", "valid"):
        (root / split).mkdir(parents=True)
    for number in range(count):
        _picture(rng).save(root / "train" / f"{number:05d}.jpg", quality=90)
    kinds: dict[str, Callable[[Image.Image, Path], object]] = {
        "same file": lambda image, path: path.write_bytes(
            (root / "train" / path.name[5:]).read_bytes()
        ),
        "recompressed": lambda image, path: image.save(path, quality=40),
        "half size": lambda image, path: image.resize((320, 240)).save(path, quality=90),
        "brighter": lambda image, path: image.point(lambda v: min(255, v * 1.25)).save(path),
    }
    planted: dict[str, list[tuple[str, str]]] = {}
    for place, (kind, write) in enumerate(kinds.items()):
        planted[kind] = []
        for number in range(place * PLANTED, (place + 1) * PLANTED):
            name = f"{number:05d}.jpg"
            with Image.open(root / "train" / name) as image:
                write(image.copy(), root / "valid" / f"copy-{name}")
            planted[kind].append((name, f"copy-{name}"))
    planted["dark"], planted["truncated"] = [], []
    for number in range(PLANTED):
        black = Image.fromarray(rng.integers(0, 6, (480, 640, 3), np.uint8))
        black.save(root / "valid" / f"dark-{number}.jpg")
        planted["dark"].append((f"dark-{number}.jpg", ""))
        data = (root / "train" / f"{count - 1 - number:05d}.jpg").read_bytes()
        (root / "valid" / f"cut-{number}.jpg").write_bytes(data[: len(data) // 2])
        planted["truncated"].append((f"cut-{number}.jpg", ""))
    for split in ("train", "valid"):
        _write_annotations(root / split)
    return planted


def _picture(rng: np.random.Generator) -> Image.Image:
    clouds = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
    pixels = np.asarray(clouds.resize(SIZE, Image.Resampling.BICUBIC), np.int16)
    pixels = pixels + rng.normal(0, 6, pixels.shape).astype(np.int16)
    for _ in range(6):
        x, y = int(rng.integers(0, 560)), int(rng.integers(0, 400))
        pixels[y : y + 80, x : x + 80] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _write_annotations(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.jpg"))
    document = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [9, 9, 90, 90], "area": 8100}
            for i in range(len(names))
        ],
        "categories": [{"id": 1, "name": "box"}],
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(document))


def checks(root: Path) -> Found:
    from rfdetr.checks import CheckConfig, check_dataset

    with tempfile.TemporaryDirectory() as cache:
        config = CheckConfig(max_findings_per_code=10**6)
        report = check_dataset(root, config=config, cache_dir=cache, progress=False)
    twins = report.of("split-duplicate-image", "split-near-duplicate", "image-duplicate")
    return Found(
        {
            _pair(str(finding.details["image"]), str(finding.details["other_file"]))
            for finding in twins
        },
        _names(str(f.details["image"]) for f in report.of("image-flat")),
        _names(str(f.details["image"]) for f in report.of("file-truncated", "file-unreadable")),
    )


def cleanvision(root: Path) -> Found:
    from cleanvision import Imagelab

    files = [str(path) for path in root.glob("*/*.jpg") if not path.name.startswith("cut-")]
    with _quiet():  # it stops at the first file that is truncated, so these are left out
        lab = Imagelab(filepaths=files)
        lab.find_issues()
    pairs: Pairs = set()
    for kind in ("exact_duplicates", "near_duplicates"):
        for group in lab.info.get(kind, {}).get("sets", []):
            pairs |= {_pair(a, b) for a in group for b in group if a != b}
    issues = lab.issues
    dark = issues.index[issues["is_dark_issue"]] if "is_dark_issue" in issues else []
    return Found(pairs, _names(map(str, dark)), set())


def imagededup(root: Path) -> Found:
    from imagededup.methods import PHash

    with _quiet(), tempfile.TemporaryDirectory() as folder:
        flat = Path(folder)
        for path in root.glob("*/*.jpg"):
            (flat / path.name).symlink_to(path)
        found = PHash(verbose=False).find_duplicates(image_dir=str(flat), max_distance_threshold=10)
    return Found({_pair(a, b) for a, others in found.items() for b in others}, set(), set())


def _pair(first: str, second: str) -> frozenset[str]:
    return frozenset(_names((first, second)))


def _names(paths: Iterable[str]) -> set[str]:
    return {Path(path).name for path in paths}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeat", type=int, default=2)
    options = parser.parse_args()
    tools = {"rfdetr.checks": checks, "cleanvision": cleanvision, "imagededup": imagededup}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        planted = build(root, options.images)
        total = len(list(root.glob("*/*.jpg")))
        seconds: dict[str, list[float]] = {name: [] for name in tools}
        found = {}
        for _ in range(options.repeat):
            for name, tool in tools.items():
                start = time.perf_counter()
                found[name] = tool(root)
                seconds[name].append(time.perf_counter() - start)
    base = min(seconds["rfdetr.checks"])
    print(f"{total} images of {SIZE[0]} x {SIZE[1]} pixels, {PLANTED} planted defects of each kind")
    columns = [*planted, "false pairs"]
    print(f"{'':14}{'images/s':>10}{'time':>8}" + "".join(f"{c:>14}" for c in columns))
    known = {frozenset(pair) for pairs in planted.values() for pair in pairs}
    for name, result in found.items():
        best = min(seconds[name])
        counts = []
        for kind, pairs in planted.items():
            single = {"dark": result.dark, "truncated": result.broken}.get(kind)
            hits = [
                a in single if single is not None else frozenset((a, b)) in result.pairs
                for a, b in pairs
            ]
            counts.append(sum(hits))
        dark = {name for name, _ in planted["dark"]}
        false = [p for p in result.pairs if p not in known and not p <= dark]
        counts.append(len(false))
        row = "".join(f"{count:>14}" for count in counts)
        print(f"{name:14}{total / best:>10.0f}{best / base:>7.1f}x{row}")


if __name__ == "__main__":
    main()
