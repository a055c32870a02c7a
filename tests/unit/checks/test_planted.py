from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from rfdetr.checks import CODES, CheckConfig, DatasetReport, check_dataset
from rfdetr.data.demo import build_demo
from tests.datasets import make_coco
from tests.unit.checks import planted_more  # noqa: F401 - registers plants
from tests.unit.checks.conftest import snapshot
from tests.unit.checks.planted import (
    COCO,
    SPLITS,
    YOLO,
    Expected,
)


def run(folder: Path, cache: Path, **options: Any) -> DatasetReport:
    return check_dataset(folder, workers=1, cache_dir=cache, progress=False, **options)


def assert_found(report: DatasetReport, expected: Expected) -> None:
    found = report.of(expected.code)
    hits = [f for f in found if all(getattr(f, k) == v for k, v in expected.place.items())]
    assert hits, f"{expected} not among {[(f.code, f.place()) for f in report.findings]}"


@pytest.mark.parametrize("layout", ["coco", "yolo", "polygons"])
def test_a_clean_dataset_has_no_error_and_no_warning(clean: dict[str, Path], layout: str) -> None:
    before = snapshot(clean[layout])
    report = run(clean[layout], clean["cache"])
    assert report.ok
    assert (report.errors, report.warnings) == (0, 0), [f.message for f in report.findings]
    assert {name: s.images for name, s in report.statistics.items()} == {
        "train": SPLITS["train"],
        "val": SPLITS["valid"],
        "test": SPLITS["test"],
    }
    assert snapshot(clean[layout]) == before


def test_plain_coco_and_the_demo_are_clean(tmp_path: Path) -> None:
    make_coco(tmp_path / "plain", splits={"train": 9, "val": 5}, segmentation=True, crowd=True)
    plain = run(tmp_path / "plain", tmp_path / "cache", dataset_file="coco")
    assert (plain.errors, plain.warnings) == (0, 0), [f.message for f in plain.findings]
    build_demo(tmp_path / "demo", train=120, valid=30, test=30)
    demo = run(tmp_path / "demo", tmp_path / "cache")
    assert (demo.errors, demo.warnings) == (0, 0), [f.message for f in demo.findings]


@pytest.mark.parametrize("name", sorted(COCO))
def test_a_planted_defect_is_found_in_coco(
    clean: dict[str, Path], name: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    expected = COCO[name](folder)
    before = snapshot(folder)
    report = run(folder, clean["cache"])
    assert_found(report, expected)
    assert report.ok == (report.severities["error"] == 0)
    assert snapshot(folder) == before
    assert DatasetReport.model_validate_json(report.to_json()) == report


@pytest.mark.parametrize("name", sorted(YOLO))
def test_a_planted_defect_is_found_in_yolo(
    clean: dict[str, Path], name: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(clean["yolo"], tmp_path / "data"))
    expected = YOLO[name](folder)
    assert_found(run(folder, clean["cache"]), expected)


def test_all_defects_at_once_are_all_found(clean: dict[str, Path], tmp_path: Path) -> None:
    """Plants that touch different places do not hide each other."""
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    names = ("file_unreferenced", "leak_exact", "duplicate_box", "category_unused", "box_nan")
    names += ("file_cut", "class_missing_from_test")
    expected = [COCO[name](folder) for name in names]
    report = run(folder, clean["cache"])
    for one in expected:
        assert report.of(one.code), one


def test_every_code_is_planted() -> None:
    """The table names nothing that no test has seen; versions and slices have tests
    of their own."""
    plants = {**COCO, **YOLO}
    source = "\n".join(
        (Path(__file__).parent / name).read_text()
        for name in ("planted.py", "planted_more.py", "test_classes.py")
    )
    elsewhere = ("version-", "slice-")
    missing = [c for c in CODES if f'"{c}"' not in source and not c.startswith(elsewhere)]
    assert not missing
    assert len(plants) > 100


def test_silenced_codes_and_severities(clean: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    COCO["box_zero"](folder)
    silent = run(folder, clean["cache"], config=CheckConfig(silence=["box-zero-area"]))
    assert "box-zero-area" not in silent.counts
    mild = run(folder, clean["cache"], config=CheckConfig(severity={"box-zero-area": "info"}))
    assert mild.ok and mild.of("box-zero-area")[0].severity == "info"
    with pytest.raises(ValueError, match="did you mean 'box-nan'"):
        CheckConfig(silence=["box-nam"])
