"""Slices have the numbers of an evaluation of only those images, or of only that area range."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from rfdetr.errors import InputError
from rfdetr.evaluation.box_table import IouType, data_from_coco
from rfdetr.evaluation.evaluator import evaluate_coco
from rfdetr.evaluation.evidence import EVERY_AREA, collect_evidence, evidence_by_area
from rfdetr.evaluation.slice_rules import parse_area, parse_rule, read_listed, text_values
from rfdetr.evaluation.slices import SplitImages, area_ranges, group_images, score_slices
from tests.unit.evaluation.random_sets import random_set


def images(document: dict) -> SplitImages:
    names = [f"site{i % 3}/{i:03d}.jpg" for i in range(len(document["images"]))]
    rows = [
        {**row, "weather": ["rain", "sun", None, ["sun", "fog"]][i % 4], "camera": {"id": i % 2}}
        for i, row in enumerate(document["images"])
    ]
    return SplitImages(names, [f"test/{name}" for name in names], rows)


def scored(document: dict, found: list[dict], kind: IouType = "bbox", **texts: str) -> dict:
    rules = [parse_rule(name, text) for name, text in texts.items()]
    ids = [category["id"] for category in document["categories"]]
    data = data_from_coco(document, found, masks=kind == "segm")
    if kind == "segm":
        data = dataclasses.replace(data, detections=data.detections.with_mask_areas())
    accepted = data.detections.score >= 0.5
    areas = [EVERY_AREA, *area_ranges(rules)]
    evidence, *by_area = evidence_by_area(data, ids, areas, iou_type=kind, accepted=accepted)
    return score_slices(rules, images(document), evidence, by_area)


def only(document: dict, found: list[dict], chosen: set[int]) -> tuple[dict, list[dict]]:
    part = {**document, "images": [i for i in document["images"] if i["id"] in chosen]}
    part["annotations"] = [a for a in document["annotations"] if a["image_id"] in chosen]
    return part, [row for row in found if row["image_id"] in chosen]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_a_slice_has_the_numbers_of_its_images_alone(seed: int, kind: IouType) -> None:
    document, found = random_set(seed, images=24, masks=kind == "segm")
    slices = scored(
        document, found, kind, site="path:(?P<site>[^/]+)/", weather="attribute:weather"
    )
    assert list(slices) == [
        "site=site0", "site=site1", "site=site2", "weather=fog", "weather=rain", "weather=sun",
    ]  # fmt: skip
    for name, row in slices.items():
        chosen = {document["images"][i]["id"] for i in row.members}
        alone, own = only(document, found, chosen)
        expected = evaluate_coco(alone, own, iou_types=(kind,))
        part = getattr(expected, kind)
        assert row.images == len(chosen)
        assert row.boxes == sum(1 for a in alone["annotations"] if not a["iscrowd"]), name
        assert row.map_50_95 == pytest.approx(part.summary.ap, abs=1e-9)
        assert row.map_50 == pytest.approx(part.summary.ap50, abs=1e-9)
        assert row.f1 == pytest.approx(expected.sweep.macro_f1.max(), abs=1e-9)
        half = expected.sweep  # wrong detections from score 0.5 on
        data = data_from_coco(alone, own, masks=kind == "segm")
        ids = half.positives * 0 + expected.class_ids
        evidence = collect_evidence(data, ids, iou_type=kind)
        wrong = (evidence.score >= 0.5) & ((evidence.matched | evidence.ignored) & 1 == 0)
        assert row.false_alarms == pytest.approx(wrong.sum() / len(chosen))


@pytest.mark.parametrize(
    ("text", "low", "high"), [("area<32**2", 0, 1023.999), ("160 <= area <= 1600", 160, 1600)]
)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_a_slice_by_area_has_the_numbers_of_that_area_range(
    text: str, low: float, high: float, kind: IouType
) -> None:
    for seed in range(3):
        document, found = random_set(seed, images=20, masks=kind == "segm")
        row = scored(document, found, kind, size=text)["size"]
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = document
            coco.createIndex()
            run = COCOeval(coco, coco.loadRes(found), kind)
            run.params.maxDets, run.params.areaRng = [1, 10, 500], [[low, high]]
            run.params.areaRngLbl = ["all"]
            run.evaluate()
            run.accumulate()
        precision = run.eval["precision"][:, :, :, 0, -1]
        valid = precision[:, :, precision[0, 0] > -1]
        assert row.map_50_95 == pytest.approx(float(valid.mean()), abs=1e-9)
        assert row.map_50 == pytest.approx(float(valid[0].mean()), abs=1e-9)
        assert row.members is None and row.evidence is not None


def test_a_slice_without_boxes_has_no_numbers() -> None:
    document, found = random_set(1, images=6)
    first = document["images"][0]["id"]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != first]
    row = scored(document, found, one="path:000")["one"]
    assert (row.images, row.boxes, row.map_50_95, row.map_50, row.f1) == (1, 0, None, None, None)
    assert row.false_alarms >= 0
    assert scored(document, found, none="path:nowhere") == {}


def test_lists_name_images_below_the_split_or_the_dataset() -> None:
    document, _ = random_set(0, images=6)
    text = "# night\n\n./site0/000.jpg\ntest/site1/001.jpg\nsite9/777.jpg\r\ntest\\site2\\002.jpg"
    rule = parse_rule("night", "file:night.txt")
    listed = read_listed(text)
    (mask,) = group_images(
        [type(rule)("night", "file", "n", listed=listed)], images(document)
    ).values()
    assert np.flatnonzero(mask).tolist() == [0, 1, 2]


def test_lists_can_have_absolute_paths() -> None:
    text = "/data/mine/test/a b.jpg\r\n/other/test/c.jpg\rtest/d.jpg\n  # no\n"
    expected = {"test/a b.jpg", "/other/test/c.jpg", "test/d.jpg"}
    assert read_listed(text, Path("/data/mine")) == expected


def test_attributes_can_be_nested_numbers_and_lists() -> None:
    document, _ = random_set(0, images=6)
    groups = group_images([parse_rule("cam", "attribute:camera.id")], images(document))
    assert {name: np.flatnonzero(mask).tolist() for name, mask in groups.items()} == {
        "cam=0": [0, 2, 4], "cam=1": [1, 3, 5],
    }  # fmt: skip
    assert [text_values(v) for v in (1.0, 1, 1.5, True, " a\n b ", " ", None, {"a": 1})] == [
        ["1"], ["1"], ["1.5"], ["true"], ["a b"], [], [], [],
    ]  # fmt: skip
    assert group_images([parse_rule("cam", "attribute:nothing.at.all")], images(document)) == {}


def test_numbers_in_names_are_sorted_by_value() -> None:
    names = [f"cam{i}/a.jpg" for i in (10, 2, 9)]
    groups = group_images([parse_rule("cam", "path:(.+)/")], SplitImages(names, names, []))
    assert list(groups) == ["cam=cam2", "cam=cam9", "cam=cam10"]


def test_a_rule_that_makes_a_slice_of_each_image_is_refused() -> None:
    names = [f"{i}.jpg" for i in range(101)]
    table = SplitImages(names, names, [])
    with pytest.raises(
        InputError, match=r"slices.each makes 101 slices, for example .*at most 100"
    ):
        group_images([parse_rule("each", "path:(.*)")], table)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("area<32**2", (0, np.nextafter(1024, 0))),
        ("area<=32*32", (0, 1024)),
        ("32**2 <= area < 96**2", (1024, np.nextafter(9216, 0))),
        ("area>96**2", (np.nextafter(9216, np.inf), 1e10)),
        ("1000 > area", (0, np.nextafter(1000, 0))),
        ("area>=10 and area<=20", (10, 20)),
        ("area < 1e3/2 + 1", (0, np.nextafter(501, 0))),
    ],
)
def test_areas(text: str, expected: tuple[float, float]) -> None:
    assert parse_area(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path:(", "not a regular expression: .* at position 0"),
        ("path:", "needs a regular expression"),
        ("path:(a)(b)", "2 groups; one group names the slices"),
        ("file:", "needs a file"),
        ("attribute: ", "needs a key"),
        ("night.txt", "write path:REGEX, file:LIST.txt, attribute:KEY"),
        ("", "write path:REGEX"),
        (7, "must be text"),
        (None, "must be text"),
        ("area", "not a comparison"),
        ("area<", "not a comparison"),
        ("area==5", "by <, <=, > or >="),
        ("area<x", "x is unknown; only area"),
        ("width<area", "width is unknown"),
        ("area<area", "compare area with a number"),
        ("area<10 or area>20", "not a comparison"),
        ("area>20 and area<10", "holds for no area"),
        ("area<9**9**9", "only numbers|between 0 and"),
        ("area<2**99", "only numbers"),
        ("area<1/0", "only numbers"),
        ("area<-5", "only numbers"),
        ("area<1e99", "between 0 and"),
        ("area<True", "only numbers"),
        ("area<__import__('os').getpid()", "only numbers"),
        ("area<(lambda: 5)()", "only numbers"),
        ("__import__('os').system('touch hacked') or area<5", "not a comparison"),
        ("area<" + "(" * 5000, "not a comparison"),
    ],
)
def test_bad_rules_are_explained_and_nothing_is_executed(
    text: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        parse_rule("x", text)
    assert not list(tmp_path.iterdir())
