from __future__ import annotations

import os
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import orjson
import pytest

from rfdetr.checks import CheckConfig, DatasetReport, check_dataset
from rfdetr.checks.codes import ACTIONS, CODES
from rfdetr.checks.html import write_html
from rfdetr.checks.markdown import to_markdown
from rfdetr.config import RFDETRNanoConfig
from rfdetr.errors import DatasetError
from tests.unit.checks import planted_more  # noqa: F401 - registers plants
from tests.unit.checks.planted import COCO, Coco

TINY = RFDETRNanoConfig.model_validate({"pretrain_weights": None, "resolution": 192})


def run(folder: Path, clean: dict[str, Path], **options: Any) -> DatasetReport:
    return check_dataset(folder, workers=1, cache_dir=clean["cache"], progress=False, **options)


@pytest.fixture(scope="module")
def spoiled(clean: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(clean["coco"], tmp_path_factory.mktemp("spoiled") / "data"))
    for name in ("box_partly_outside", "leak_exact", "file_cut", "category_unused"):
        COCO[name](folder)
    return folder


def test_json_is_stable_and_deterministic(
    clean: dict[str, Path], spoiled: Path, tmp_path: Path
) -> None:
    report = run(spoiled, clean)
    report.write(tmp_path / "report.json")
    assert DatasetReport.read(tmp_path / "report.json") == report
    assert run(spoiled, clean).to_json() == report.to_json()
    raw = orjson.loads((tmp_path / "report.json").read_bytes())
    assert raw["schema_version"] == 1
    assert {"findings", "counts", "statistics", "fingerprints", "comparison"} <= raw.keys()
    severities = [finding["severity"] for finding in raw["findings"]]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)


def test_a_file_that_is_not_a_report_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"schema_version": 99}', '{"schema_version": 1, "dataset": 5}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DatasetError, match=r"x\.json"):
            DatasetReport.read(tmp_path / "x.json")


def test_html_stands_alone_and_shows_thumbnails(
    clean: dict[str, Path], spoiled: Path, tmp_path: Path
) -> None:
    report = run(spoiled, clean)
    write_html(report, tmp_path / "report.html", spoiled)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!data:)", text)
    assert "<script" not in text
    charts = re.findall(r'<figure class="chart">.*?</figure>', text, re.DOTALL)
    assert len(charts) == 3
    assert all(len(list(ET.fromstring(chart).iter("i"))) > 5 for chart in charts)
    assert "data:image/jpeg;base64," in text
    assert "box-outside" in text and "split-duplicate-image" in text


def test_names_cannot_inject_markup(clean: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    for split in ("train", "valid", "test"):
        data = Coco(folder, split)
        data.categories[0]["name"] = "<script>alert(1)</script>|x"
        data.categories.append({"id": 8, "name": "<b>|", "supercategory": "none"})
        data.save()
    report = run(folder, clean)
    write_html(report, tmp_path / "report.html", folder)
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert "<script" not in to_markdown(report) and "<b>" not in to_markdown(report)


def test_markdown_lists_codes_places_and_statistics(clean: dict[str, Path], spoiled: Path) -> None:
    text = to_markdown(run(spoiled, clean))
    assert "Not ready for training" in text
    assert "| split-duplicate-image | warning | 1 |" in text
    assert "train/\\_annotations.coco.json" in text
    assert "| washer |" in text


def test_statistics_count_boxes_at_the_model_resolution(
    clean: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    data = Coco(folder)
    image = data.images[0]  # 96 x 64 becomes 192 x 192: scales 2 and 3
    boxes = [[0, 0, 6, 5], [20, 20, 40, 30], [50, 40, 8, 16 / 3]]
    data.document["annotations"] = [
        {"id": i + 1, "image_id": image["id"], "category_id": i, "bbox": b, "area": b[2] * b[3]}
        for i, b in enumerate(boxes)
    ]
    data.save()
    numbers = run(folder, clean, model_config=TINY).statistics["train"]
    assert (numbers.images, numbers.boxes) == (12, 3)
    assert numbers.images_without_boxes == 11
    assert numbers.class_counts == {"washer": 1, "bolt": 1, "nut": 1}
    assert numbers.boxes_below_patch == 1  # sides 12 x 15; 16 x 16 is not below a patch of 16
    assert numbers.box_side_histogram["8-16"] == 1
    assert numbers.box_side_histogram["16-32"] == 1
    assert numbers.box_side_histogram["64-128"] == 1
    assert numbers.boxes_per_image["0"] == 11
    assert numbers.colour_mean is not None and all(80 < c < 140 for c in numbers.colour_mean)


def test_comparison_with_a_previous_version(clean: dict[str, Path], tmp_path: Path) -> None:
    before = run(clean["coco"], clean)
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    data = Coco(folder)
    data.annotations[0]["bbox"][0] += 1.0
    data.annotations[0]["segmentation"] = []
    data.images[11]["file_name"] = "renamed.jpg"
    data.save()
    (folder / "train" / "image_0011.jpg").rename(folder / "train" / "renamed.jpg")
    other = folder / "valid" / "image_0000.jpg"
    other.write_bytes(other.read_bytes() + b"\0")
    before.write(tmp_path / "old.json")
    found = [
        run(folder, clean, previous=previous).comparison
        for previous in (before, tmp_path / "old.json", clean["coco"])
    ]
    assert found[0] == found[1] == found[2]
    assert found[0] is not None
    counts = found[0].images_added, found[0].images_removed, found[0].images_changed
    assert counts == (1, 1, 1)
    assert found[0].annotations_changed == 1
    assert found[0].examples["added"] == ["train/renamed.jpg"]


def test_class_shift_is_reported(clean: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    data = Coco(folder)
    data.document["annotations"] = [a for a in data.annotations if a["category_id"] != 2]
    data.save()
    report = run(folder, clean, previous=run(clean["coco"], clean))
    assert "'nut'" in " ".join(f.message for f in report.of("version-class-shift"))
    assert report.comparison is not None
    assert report.comparison.class_count_shift["nut"] < 0
    assert report.comparison.class_count_shift["bolt"] == 0


def test_the_listing_limit_keeps_the_counts(clean: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clean["coco"], tmp_path / "data"))
    data = Coco(folder)
    for annotation in data.annotations:
        annotation["bbox"][2] = 0
    data.save()
    report = run(folder, clean, config=CheckConfig(max_findings_per_code=3))
    assert len(report.of("box-zero-area")) == 3
    assert report.counts["box-zero-area"] == len(data.annotations)
    assert report.warnings >= len(data.annotations)
    assert report.of("split-nothing-to-train")


@pytest.mark.parametrize("kind", ["coco", "yolo"])
def test_a_file_name_that_is_not_utf8_is_in_the_report(
    clean: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(clean[kind], tmp_path / "data"))
    images = (path for path in sorted(folder.rglob("*.[jp][pn]g")) if "train" in str(path))
    image = next(images)
    shutil.copy(image, os.fsencode(image.parent) + b"/bad\xff" + image.suffix.encode())
    report = run(folder, clean)
    report.write(tmp_path / "report.json")
    to_markdown(report)
    write_html(report, tmp_path / "report.html", folder)
    read = DatasetReport.read(tmp_path / "report.json")
    places = [f"{finding.file} {finding.message}" for finding in read.findings]
    assert any(r"bad\udcff" in place for place in places)


def test_every_code_has_an_action_that_its_repair_allows() -> None:
    for code, info in CODES.items():
        assert info.action in ACTIONS, code
        assert info.repair or info.action != "repair", code
        assert info.severity == "info" or info.action != "info", code
    assert {CODES[c].action for c in ("annotation-id-zero", "file-name-portability")} == {"info"}
