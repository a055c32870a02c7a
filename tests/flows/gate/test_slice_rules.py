"""The gate's rule per slice, its findings, and where lists are read from."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from flows.config.params import parse_params
from flows.config.sections import DatasetSettings
from flows.gate.decide import RULES
from flows.gate.report import sections
from flows.gate.slice_images import EMPTY, add_findings
from flows.gate.verdict import AtPoint
from flows.project.project import Project
from rfdetr.checks.dataset_report import DatasetReport
from rfdetr.errors import ConfigError
from rfdetr.evaluation.slice_rules import parse_rule
from rfdetr.evaluation.slices import Slice
from tests.datasets import make_roboflow, make_yolo
from tests.flows.gate.test_gate import failed, judge, matches, rule, scores


def row(ap: float | None, boxes: int = 100, **more: Any) -> Slice:
    numbers = {"map_50": ap, "f1": ap, "false_alarms": 0.5, **more}
    return Slice(images=30, boxes=boxes, map_50_95=ap, **numbers)


@pytest.mark.parametrize(
    ("old", "new", "passed", "reason"),
    [
        (row(0.6), row(0.5), False, "mAP 0.6000 -> 0.5000, largest accepted drop 0.0500"),
        (row(0.6), row(0.55), True, "mAP 0.6000 -> 0.5500"),
        (row(0.6), row(0.5499), False, "mAP 0.6000 -> 0.5499"),
        (row(0.6, 49), row(0.1, 49), None, "49 boxes, 50 required to judge"),
        (row(None, 0), row(None, 0), None, "0 boxes, 50 required to judge"),
        (row(0.6), None, False, "the challenger was not scored on this slice"),
        (None, row(0.6), False, "the champion was not scored on this slice"),
        (row(math.nan), row(0.6), False, "mAP nan -> 0.6000"),
        (row(0.6), row(math.nan), False, "mAP 0.6000 -> nan"),
        (row(0.6), row(None), False, "mAP 0.6000 -> nan"),
        (row(0.6), row(0.9), True, "mAP 0.6000 -> 0.9000"),
    ],
)
def test_a_slice_may_not_drop_while_the_mean_rises(
    old: Slice | None, new: Slice | None, passed: bool | None, reason: str
) -> None:
    champion = scores(0.5, slices={"site=a": old} if old else {})
    challenger = scores(0.7, slices={"site=a": new} if new else {})
    verdict = judge(champion, challenger)
    assert rule(verdict, "slice site=a").passed is passed
    assert reason in rule(verdict, "slice site=a").reason
    assert failed(verdict) == ({"slice site=a"} if passed is False else set())
    assert ("slice site=a: " in verdict.reason) is (passed is False)


def test_the_limits_of_slices_are_parameters_and_a_first_model_is_not_compared() -> None:
    champion, challenger = scores(0.5, slices={"a": row(0.6)}), scores(0.7, slices={"a": row(0.5)})
    assert judge(champion, challenger, max_slice_drop=0.1).promote
    assert judge(champion, challenger, slice_min_boxes=101).promote
    first = judge(None, challenger)
    assert first.promote and rule(first, "slice a").reason == "no champion yet"
    assert len(first.rules) == len(RULES) + 1


def test_the_change_of_a_slice_has_its_own_interval() -> None:
    old, new = matches(0.5, images=80), matches(0.9, images=80)
    half = row(0.5, members=tuple(range(40)))
    area = row(0.5, evidence=old.take(range(20)))  # type: ignore[arg-type]
    one = row(0.5, members=(0,))  # an interval of one image would have no width
    champion = scores(0.5, evidence=old, slices={"half": half, "small": area, "one": one})
    better = dataclasses.replace(area, evidence=new.take(range(20)))  # type: ignore[arg-type]
    challenger = scores(0.9, evidence=new, slices={"half": half, "small": better, "one": one})
    verdict = judge(champion, challenger)
    assert set(verdict.slices) == {"half", "small"}
    for change in verdict.slices.values():
        assert change.lower <= change.change <= change.upper
    assert verdict.slices["half"].change > 0
    assert all(s.members is None and s.evidence is None for s in verdict.challenger.slices.values())
    assert f"{verdict.slices['half'].lower:+.4f}" in rule(verdict, "slice half").reason
    table = next(s for s in sections(challenger, verdict) if s.title == "Slices")
    assert table.header[-1] == "Change against the champion (95 %)"
    assert table.rows[0][-1].startswith(f"{verdict.slices['half'].change:+.4f} [")


def at_point(**changes: Any) -> AtPoint:
    fields: dict[str, Any] = {
        "target": "f1", "chosen_on": "valid", "f1": 0.7, "precision": 0.8, "recall": 0.6,
        "false_alarms": 0.3, "detections": 10, "note": "", "classes": {},
    }  # fmt: skip
    return AtPoint(**{**fields, **changes})


def test_false_alarms_have_a_budget() -> None:
    few = scores(0.6, operating_point=at_point())
    assert judge(None, few, max_false_alarms_per_image=0.3).promote
    assert failed(judge(None, few, max_false_alarms_per_image=0.29)) == {"false_alarms"}
    assert failed(judge(None, scores(0.6), max_false_alarms_per_image=1)) == {"false_alarms"}


def test_metrics_at_the_point_need_a_point() -> None:
    gate = {"metric": "f1_at_point", "max_false_alarms_per_image": 1.0}
    with pytest.raises(
        ConfigError, match=r"gate.metric: f1_at_point needs evaluate.operating_point"
    ) as told:
        parse_params({"gate": gate})
    assert "gate.max_false_alarms_per_image: needs evaluate.operating_point" in str(told.value)
    parse_params({"gate": gate, "evaluate": {"operating_point": "precision >= 0.95"}})
    with pytest.raises(ConfigError, match=r"evaluate.operating_point: must be f1, or precision"):
        parse_params({"evaluate": {"operating_point": "precision>0.95"}})


def test_all_mistakes_in_slices_are_reported_at_once() -> None:
    bad = {"site": "path:(", "small": "area<x", "a b": "path:x", "night": 5}
    with pytest.raises(ConfigError) as told:
        parse_params({"slices": bad})
    text = str(told.value)
    assert "4 mistakes" in text
    for name in (
        "slices.site: '('",
        "slices.small: 'area<x'",
        "the name 'a b'",
        "slices.night: must",
    ):
        assert name in text
    with pytest.raises(ConfigError, match="slices: expected names with their rules"):
        parse_params({"slices": ["path:x"]})


def found(folder: Path, layout: str, **texts: str) -> list[str]:
    rules = [parse_rule(name, text) for name, text in texts.items()]
    report = DatasetReport(dataset="d", layout=layout)
    result = add_findings(report, folder, DatasetSettings(layout=layout), rules)
    assert result.counts.get(EMPTY, 0) == result.warnings == len(result.findings)
    return [finding.message for finding in result.findings]


def test_a_slice_without_test_images_is_a_finding(tmp_path: Path) -> None:
    folder = make_roboflow(tmp_path / "d", splits={"train": 6, "valid": 3, "test": 2})
    assert found(folder, "roboflow", all="path:image", tiny="area<100000") == []
    texts = found(folder, "roboflow", late="path:_0004", none="path:x", w="attribute:weather")
    assert texts == [
        "the slice late has 1 in train, and none in test",
        "the slice rule none matches nothing in the dataset (found 'x')",
        "the slice rule w matches nothing in the dataset (found 'weather')",
    ]
    per_value = found(folder, "roboflow", n=r"path:_000(\d)")
    assert per_value[0] == "the slice n=2 has 1 in train and 1 in val, and none in test"
    assert len(per_value) == 4


def test_slices_of_yolo_datasets(tmp_path: Path) -> None:
    folder = make_yolo(tmp_path / "d", splits={"train": 4, "val": 2, "test": 2})
    assert found(folder, "yolo", all="path:^[^/]+$") == []  # below the images folder
    with pytest.raises(ConfigError, match="attribute need COCO annotations"):
        found(folder, "yolo", w="attribute:weather")


def test_lists_are_read_from_the_project_or_the_dataset(tmp_path: Path) -> None:
    make_roboflow(tmp_path / "data/demo", splits={"train": 3, "valid": 2, "test": 2})
    project = Project(tmp_path)
    project.params = parse_params({"slices": {"night": "file:night.txt", "fog": "file:l/fog.txt"}})
    with pytest.raises(
        ConfigError, match=r"(?s)slices.night: neither .*night.txt nor .*slices.fog"
    ):
        _ = project.slices
    (tmp_path / "night.txt").write_text("test/image_0000.jpg\n")
    (tmp_path / "data/demo/l").mkdir()
    (tmp_path / "data/demo/l/fog.txt").write_text("image_0001.jpg\nimage_7777.jpg\n")
    first = project.params.evaluate.key(project.slices)
    report = DatasetReport(dataset="d", layout="roboflow")
    result = add_findings(report, project.dataset_dir, project.params.dataset, project.slices)
    assert [f.message for f in result.findings] == [
        "1 of 2 paths in l/fog.txt are not images of the dataset: image_7777.jpg"
    ]
    (tmp_path / "night.txt").write_bytes("test/image_0001.jpg\r\n".encode("utf-16"))
    project.reload()
    project.params = parse_params({"slices": {"night": "file:night.txt", "fog": "file:l/fog.txt"}})
    assert project.params.evaluate.key(project.slices) != first  # both models are scored again


def test_a_list_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.params = parse_params({"slices": {"night": "file:night.txt"}})
    (tmp_path / "night.txt").write_bytes("test/für.jpg\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"slices.night: .*night.txt is not UTF-8"):
        _ = project.slices
