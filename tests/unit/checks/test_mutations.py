from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from rfdetr.checks import CheckConfig, DatasetReport, check_dataset
from rfdetr.checks.html import to_html
from rfdetr.checks.markdown import to_markdown
from rfdetr.errors import DatasetError
from tests.datasets import make_roboflow, make_yolo
from tests.unit.checks.mutate import mutate_bytes, mutate_json, mutate_labels, mutate_yaml

SPLITS = {"train": 2, "valid": 1}
SECONDS = 20.0  # for files of a few kilobytes, on a loaded machine
TARGETS = {
    "coco": ("train/_annotations.coco.json", mutate_json),
    "labels": ("train/labels/image_0000.txt", mutate_labels),
    "yaml": ("data.yaml", mutate_yaml),
}


def run(kind: str, root: Path, seeds: range) -> dict[str, int]:
    """Check one mutated dataset per seed; the outcome is always a report or a clear error."""
    folder = root / kind
    if kind == "coco":
        make_roboflow(folder, splits=SPLITS, segmentation=True, crowd=True)
    else:
        make_yolo(folder, splits=SPLITS, polygons=kind == "labels")
    name, mutate_structure = TARGETS[kind]
    original = (folder / name).read_bytes()
    outcomes = {"error": 0, "findings": 0, "clean": 0}
    for seed in seeds:
        rng = random.Random(f"{kind}-{seed}")
        data = original
        if rng.random() < 0.7:
            data = mutate_structure(data, rng)
        if rng.random() < 0.5:
            data = mutate_bytes(data, rng)
        (folder / name).write_bytes(data)
        started = time.monotonic()
        outcomes[check(folder, root / "cache", images=seed % 10 == 0)] += 1
        assert time.monotonic() - started < SECONDS, seed
    return outcomes


def check(folder: Path, cache: Path, images: bool) -> str:
    try:
        report = check_dataset(
            folder,
            config=CheckConfig(check_images=images),
            workers=1,
            cache_dir=cache,
            progress=False,
        )
    except DatasetError as error:
        assert str(folder) in str(error)
        return "error"
    assert DatasetReport.model_validate_json(report.to_json()).counts == report.counts
    if images:
        assert to_html(report, folder).endswith("</html>\n")
        assert to_markdown(report)
    return "findings" if report.findings else "clean"


@pytest.mark.parametrize("kind", sorted(TARGETS))
def test_a_mutated_file_gives_a_report_or_a_clear_error(kind: str, tmp_path: Path) -> None:
    outcomes = run(kind, tmp_path, range(100))
    assert outcomes["findings"] > 30, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("kind", sorted(TARGETS))
def test_ten_thousand_mutated_files(kind: str, part: int, tmp_path: Path) -> None:
    run(kind, tmp_path, range(1000 + part * 334, 1000 + (part + 1) * 334))
