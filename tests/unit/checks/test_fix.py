from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rfdetr.checks import CODES, CheckConfig, DatasetReport, check_dataset
from rfdetr.checks.repair.copy import REPAIRS, plan_text, repair_dataset
from rfdetr.errors import DatasetError
from tests.unit.checks import planted_more  # noqa: F401 - registers plants
from tests.unit.checks.conftest import snapshot
from tests.unit.checks.planted import COCO, YOLO

ALL = CheckConfig(max_findings_per_code=10**9)


def run(folder: Path, clean: dict[str, Path], **options: Any) -> DatasetReport:
    options.setdefault("config", ALL)
    return check_dataset(folder, workers=1, cache_dir=clean["cache"], progress=False, **options)


def repairable(plants: dict[str, Any]) -> list[str]:
    skipped = ("json_", "yaml_", "valid_", "test_", "train_", "mostly_", "category_", "class_")
    return sorted(name for name in plants if not name.startswith(skipped))


@pytest.mark.parametrize(
    ("layout", "name"),
    [("coco", name) for name in repairable(COCO)] + [("yolo", name) for name in repairable(YOLO)],
)
def test_a_repaired_copy_has_lost_its_repairable_findings(
    clean: dict[str, Path], tmp_path: Path, layout: str, name: str
) -> None:
    folder = Path(shutil.copytree(clean[layout], tmp_path / "data"))
    expected = (COCO if layout == "coco" else YOLO)[name](folder)
    before = run(folder, clean)
    if not any(finding.repair for finding in before.of(expected.code)):
        pytest.skip(f"{expected.code} needs a decision")
    kept = snapshot(folder)
    result = repair_dataset(folder, before, tmp_path / "repaired")
    assert snapshot(folder) == kept
    after = run(tmp_path / "repaired", clean)
    assert expected.code not in after.counts, after.of(expected.code)
    assert after.errors == 0, [(f.code, f.message) for f in after.findings]
    assert result.repaired[expected.code] >= 1


def test_many_defects_are_repaired_together(clean: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    names = ("file_other_format", "duplicate_box", "box_partly_outside", "leak_exact")
    for name in (*names, "file_stray", "file_unreferenced"):
        COCO[name](folder)
    repair_dataset(folder, run(folder, clean), tmp_path / "repaired")
    after = run(tmp_path / "repaired", clean)
    assert (after.errors, after.warnings) == (0, 0), [(f.code, f.message) for f in after.findings]
    document = json.loads((tmp_path / "repaired" / "train" / "_annotations.coco.json").read_text())
    assert document["images"][1]["file_name"] == "image_0001.bmp"
    with Image.open(tmp_path / "repaired" / "train" / "image_0001.bmp") as image:
        assert image.format == "BMP"


def test_the_exif_tag_goes_without_touching_pixels(clean: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    COCO["file_exif"](folder)
    repair_dataset(folder, run(folder, clean), tmp_path / "repaired")
    with (
        Image.open(folder / "train" / "image_0001.jpg") as old,
        Image.open(tmp_path / "repaired" / "train" / "image_0001.jpg") as new,
    ):
        assert old.getexif().get(0x0112) == 6
        assert 0x0112 not in new.getexif()
        assert old.tobytes() == new.tobytes()


def test_a_repaired_yolo_copy_does_not_point_into_its_source(
    clean: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(clean["yolo"], tmp_path / "data"))
    text = (folder / "data.yaml").read_text()
    text = text.replace("val: valid", f"val: {folder.resolve()}/valid")
    (folder / "data.yaml").write_text(f"path: {folder.resolve()}\n{text}")
    YOLO["label_zero"](folder)
    repair_dataset(folder, run(folder, clean), tmp_path / "repaired")
    assert str(folder) not in (tmp_path / "repaired" / "data.yaml").read_text()
    shutil.rmtree(folder)
    after = run(tmp_path / "repaired", clean)
    assert (after.errors, after.warnings) == (0, 0), [(f.code, f.message) for f in after.findings]
    assert after.statistics["val"].images == 6


def test_the_plan_names_every_repair(clean: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    COCO["box_zero"](folder)
    COCO["category_unused"](folder)
    text = plan_text(run(folder, clean))
    assert "annotation 2: remove the annotation (box-zero-area)" in text
    assert "by hand: 1 x category-unused" in text
    assert {info.repair for info in CODES.values() if info.repair} == REPAIRS.keys()


def test_refusals(clean: dict[str, Path], tmp_path: Path) -> None:
    report = run(clean["coco"], clean)
    with pytest.raises(DatasetError, match="overlaps"):
        repair_dataset(clean["coco"], report, clean["coco"] / "repaired")
    (tmp_path / "there").mkdir()
    with pytest.raises(DatasetError, match="already exists"):
        repair_dataset(clean["coco"], report, tmp_path / "there")
    cut = report.model_copy(update={"counts": {"box-nan": 5}})
    with pytest.raises(DatasetError, match="only some of its findings"):
        repair_dataset(clean["coco"], cut, tmp_path / "new")
    assert not (tmp_path / "new").exists()
