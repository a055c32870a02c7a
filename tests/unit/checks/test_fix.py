from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rfdetr.checks import CODES, CheckConfig, DatasetReport, check_dataset
from rfdetr.checks.repair.copy import plan_repair, repair_dataset
from rfdetr.checks.repair.plan import REPAIRS
from rfdetr.checks.repair.result import RepairResult
from rfdetr.errors import DatasetError
from tests.unit.checks import planted_more  # noqa: F401 - registers plants
from tests.unit.checks.conftest import snapshot
from tests.unit.checks.planted import COCO, YOLO, Coco

ALL = CheckConfig(max_findings_per_code=10**9)
DECISIONS = frozenset({"file_exif", "file_sixteen_bits", "image_id_twice"})


def run(folder: Path, clean: dict[str, Path], **options: Any) -> DatasetReport:
    options.setdefault("config", ALL)
    return check_dataset(folder, workers=1, cache_dir=clean["cache"], progress=False, **options)


def repairable(plants: dict[str, Any]) -> list[str]:
    skipped = ("json_", "yaml_", "valid_", "test_", "train_", "mostly_", "category_", "class_")
    return sorted(name for name in plants if not name.startswith(skipped))


def repair(
    folder: Path, out: Path, clean: dict[str, Path], *, allow_drop: bool = False
) -> tuple[RepairResult, DatasetReport]:
    """Repair a dataset and check the copy; the dataset must stay as it is."""
    kept = snapshot(folder)
    check = partial(run, clean=clean)
    result = repair_dataset(folder, check(folder), out, check=check, allow_drop=allow_drop)
    assert snapshot(folder) == kept
    return result, check(out)


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
    if name in DECISIONS:
        pytest.skip(f"{name} needs a decision")
    result, after = repair(folder, tmp_path / "repaired", clean, allow_drop=True)
    assert expected.code not in after.counts, after.of(expected.code)
    assert after.errors == 0, [(f.code, f.message) for f in after.findings]
    assert result.repaired[expected.code] >= 1


def test_many_defects_are_repaired_together(clean: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    names = ("file_other_format", "duplicate_box", "box_partly_outside", "leak_exact")
    for name in (*names, "file_stray", "file_unreferenced"):
        COCO[name](folder)
    _, after = repair(folder, tmp_path / "repaired", clean, allow_drop=True)
    assert (after.errors, after.warnings) == (0, 0), [(f.code, f.message) for f in after.findings]
    document = json.loads((tmp_path / "repaired" / "train" / "_annotations.coco.json").read_text())
    assert document["images"][1]["file_name"] == "image_0001.bmp"
    with Image.open(tmp_path / "repaired" / "train" / "image_0001.bmp") as image:
        assert image.format == "BMP"


def test_what_training_uses_is_a_decision(clean: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    for name in ("duplicate_box", "leak_exact"):
        COCO[name](folder)
    result, after = repair(folder, tmp_path / "repaired", clean)
    assert after.counts["box-duplicate"] == 1 and after.counts["split-duplicate-image"] == 1
    assert result.before == result.after and not result.better
    assert "The copy is not better" in result.text()


def _view(orientation: int, stored: Image.Image) -> Image.Image:
    turned = {
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return stored.transpose(turned[orientation])


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_the_rotated_view_are_turned(
    clean: dict[str, Path], tmp_path: Path, orientation: int
) -> None:
    """The size proves which view was annotated; the file, its pixels and tags stay as they are."""
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[10:30, 50:80] = (255, 0, 0)
    stored = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    stored.save(folder / "train" / "image_0001.png", exif=exif.tobytes())
    (folder / "train" / "image_0001.jpg").unlink()
    x0, y0, x1, y1 = _view(orientation, stored).getbbox() or (0, 0, 0, 0)
    data = Coco(folder)
    data.images[1].update(file_name="image_0001.png", width=64, height=96)
    data.document["annotations"] = [a for a in data.annotations if a["image_id"] != 2]
    ring = [x0, y0, x1, y0, x1, y1]
    box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": 600, "segmentation": [ring]}
    data.annotations.append({"id": 99, "image_id": 2, "category_id": 1, "iscrowd": 0, **box})
    data.save()
    _, after = repair(folder, tmp_path / "repaired", clean)
    assert after.errors == 0, [(f.code, f.message) for f in after.findings]
    assert after.counts["image-exif-rotated"] == 1
    fixed = Coco(tmp_path / "repaired")
    assert (fixed.images[1]["width"], fixed.images[1]["height"]) == (96, 64)
    assert fixed.annotations[-1]["bbox"] == [50, 10, 30, 20]
    points = fixed.annotations[-1]["segmentation"][0]
    assert (min(points[::2]), max(points[::2])) == (50, 80)
    assert (min(points[1::2]), max(points[1::2])) == (10, 30)
    name = "train/image_0001.png"
    assert (tmp_path / "repaired" / name).read_bytes() == (folder / name).read_bytes()


def test_rotation_without_proof_is_a_decision(clean: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    COCO["file_exif"](folder)
    _, after = repair(folder, tmp_path / "repaired", clean)
    assert after.counts["image-exif-rotated"] == 1
    name = "train/image_0001.jpg"
    assert (tmp_path / "repaired" / name).read_bytes() == (folder / name).read_bytes()


def test_a_repaired_yolo_copy_does_not_point_into_its_source(
    clean: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(clean["yolo"], tmp_path / "data"))
    text = (folder / "data.yaml").read_text()
    text = text.replace("val: valid", f"val: {folder.resolve()}/valid")
    (folder / "data.yaml").write_text(f"path: {folder.resolve()}\n{text}")
    YOLO["label_zero"](folder)
    repair(folder, tmp_path / "repaired", clean, allow_drop=True)
    assert str(folder) not in (tmp_path / "repaired" / "data.yaml").read_text()
    shutil.rmtree(folder)
    after = run(tmp_path / "repaired", clean)
    assert (after.errors, after.warnings) == (0, 0), [(f.code, f.message) for f in after.findings]
    assert after.statistics["val"].images == 6


def test_the_plan_names_every_repair(clean: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    COCO["box_zero"](folder)
    COCO["category_unused"](folder)
    kept = snapshot(folder)
    check = partial(run, clean=clean)
    text = plan_repair(folder, check(folder), check=check, allow_drop=True).plan()
    assert "annotation 2: remove the annotation (box-zero-area)" in text
    assert "by hand: 1 x category-unused" in text
    assert {info.repair for info in CODES.values() if info.repair} <= REPAIRS.keys()
    assert snapshot(folder) == kept


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
