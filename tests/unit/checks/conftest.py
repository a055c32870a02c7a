from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.checks.planted import make_clean_coco, make_clean_yolo


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Clean datasets in three layouts, never changed, and a cache that all tests may share."""
    root = tmp_path_factory.mktemp("clean")
    return {
        "coco": make_clean_coco(root / "coco"),
        "yolo": make_clean_yolo(root / "yolo"),
        "polygons": make_clean_yolo(root / "polygons", polygons=True),
        "cache": root / "cache",
    }


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file and the time of every folder."""
    found = {}
    for place, _, files in os.walk(folder):
        for name in files:
            status = (Path(place) / name).stat()
            found[f"{place}/{name}"] = (status.st_size, status.st_mtime_ns)
        found[place] = (0, Path(place).stat().st_mtime_ns)
    return found
