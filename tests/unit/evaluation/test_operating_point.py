from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rfdetr.errors import InputError
from rfdetr.evaluation.calibration import calibration
from rfdetr.evaluation.evidence import MatchEvidence
from rfdetr.evaluation.operating_point import (
    MIN_BOXES,
    OperatingPoint,
    choose_point,
    point_numbers,
    read_point,
)
from rfdetr.evaluation.targets import parse_target
from rfdetr.files import sha256_file


def evidence(scores: list[list[float]], right: list[list[int]], boxes: list[int]) -> MatchEvidence:
    """Detections and boxes per class, all in one image; `right` marks the true ones."""
    label = np.repeat(np.arange(len(scores)), [len(row) for row in scores])
    count = len(label)
    return MatchEvidence(
        positives=np.array([boxes], dtype=np.int32),
        image=np.zeros(count, dtype=np.int32),
        label=label.astype(np.int32),
        score=np.concatenate(scores).astype(np.float32),
        matched=np.concatenate(right).astype(np.uint16) * 1023,
        ignored=np.zeros(count, dtype=np.uint16),
        accepted=np.zeros(count, dtype=bool),
    )


SCORES = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
RIGHT = [1, 1, 0, 1, 0, 0]  # precision 1, 1, .67, .75, .6, .5


def chosen(target: str, boxes: int = MIN_BOXES, right: list[int] = RIGHT) -> OperatingPoint:
    many = MIN_BOXES // 2  # each detection ten times, so that the class is not thin
    scores = [s + n * 1e-4 for s in SCORES for n in range(many)]
    flags = [flag for flag in right for _ in range(many)]
    return choose_point(evidence([scores], [flags], [boxes * 2]), [7], ["cat"], target, "valid")


@pytest.mark.parametrize(
    ("target", "low", "high"),
    [
        ("f1", 0.5009, 0.6),  # 30 of 40 right
        ("precision>=0.95", 0.7, 0.71),
        ("precision>=0.7", 0.5, 0.501),
        ("recall>=0.5", 0.7009, 0.8),
        ("recall>=0.7", 0.6, 0.601),
    ],
)
def test_the_target_decides_the_threshold(target: str, low: float, high: float) -> None:
    (row,) = chosen(target, boxes=20).classes
    assert low <= row.threshold < high, row
    assert row.reached and not row.shared and row.label == 7 and row.name == "cat"
    kind, least = parse_target(target)
    assert kind == "f1" or getattr(row, kind) >= least


def test_a_target_that_is_out_of_reach_is_said_with_what_was_chosen() -> None:
    point = chosen("recall>=0.9")  # 30 of 40 boxes are found at most
    (row,) = point.classes
    assert not row.reached and row.recall == pytest.approx(0.75)
    assert row.threshold > 0.5  # not lower than what the best recall needs
    assert "recall>=0.9 is not reached on valid" in point.unreached()
    assert "cat 0.750 at score" in point.unreached()
    wrong_first = chosen("precision>=0.95", right=[0, 1, 1, 1, 0, 0])
    (row,) = wrong_first.classes
    assert not row.reached and row.precision == pytest.approx(0.75)
    assert "precision>=0.95 is not reached on valid, the best was chosen: cat 0.750" in (
        wrong_first.unreached()
    )
    assert chosen("f1").unreached() == ""


def test_thin_classes_share_a_threshold() -> None:
    scores = [[0.9 - 0.01 * i for i in range(30)], [0.9, 0.3], [0.8, 0.2], [0.35]]
    right = [[1] * 20 + [0] * 10, [1, 0], [1, 0], [0]]
    found = choose_point(
        evidence(scores, right, [20, 10, 12, 0]), [1, 2, 3, 4], list("abcd"), "f1", "v"
    )
    own, *thin = found.classes
    assert not own.shared and all(row.shared for row in thin)
    assert {row.threshold for row in thin} == {found.default}
    assert 0.35 < found.default < 0.8  # of classes b, c and d together, not of a
    alone = choose_point(evidence(scores[:2], right[:2], [20, 3]), [1, 2], list("ab"), "f1", "v")
    assert alone.classes[1].shared  # too few boxes: all classes together


def test_nothing_detected_and_nothing_to_detect() -> None:
    empty = choose_point(
        evidence([[], []], [[], []], [30, 0]), [0, 1], ["a", "b"], "recall>=0.5", "v"
    )
    assert [row.threshold for row in empty.classes] == [0.5, 0.5]
    assert not empty.classes[0].reached and empty.unreached().count("a 0.000") == 1
    with pytest.raises(InputError, match="valid split has no boxes"):
        choose_point(evidence([[0.5]], [[0]], [0]), [0], ["a"], "f1", "valid")


def test_a_detection_at_a_threshold_is_decided_the_same_in_both_precisions() -> None:
    point = chosen("f1")
    threshold = point.classes[0].threshold
    near = np.nextafter(np.float32(threshold), np.float32([0, 1]))
    assert point.accepts(np.array([7, 7]), near).tolist() == [False, True]
    assert point.below_lowest < threshold
    assert np.float32(point.below_lowest) < np.float32(threshold)


def test_labels_of_the_model_get_the_thresholds_of_the_dataset() -> None:
    point = chosen("f1")
    model = point.relabelled({1: 7}, {1: "cat", 2: "dog"})
    labels, scores = np.array([1, 2, 3]), np.array([0.99, 0.99, 1.0])
    assert model.accepts(labels, scores).tolist() == [True, True, False]  # 3 has no name
    assert OperatingPoint.from_dict(json.loads(json.dumps(model.to_dict()))) == model


def test_numbers_at_the_point() -> None:
    record = evidence([[0.9, 0.8, 0.3], [0.7]], [[1, 0, 1], [0]], [2, 1])
    record.accepted[:] = [True, True, False, True]
    found = point_numbers(record)
    assert found.detections == 3 and found.false_alarms == 2
    assert found.class_precision == [0.5, 0.0] and found.class_recall == [0.5, 0.0]
    assert found.f1 == pytest.approx(0.25)


@pytest.mark.parametrize(
    "text", ["precision>=0.95", " recall >= 0.9 ", "f1", "precision>=1", "recall>=.5"]
)
def test_targets(text: str) -> None:
    assert parse_target(text).kind in text


@pytest.mark.parametrize(
    "text",
    ["", "F1", "precision", "precision>0.9", "recall>=0", "recall>=1.5", "recall>=90%", "ap>=1"],
)
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="must be f1, or precision or recall"):
        parse_target(text)


def test_the_point_is_read_from_the_description_of_these_weights(tmp_path: Path) -> None:
    weights, card = tmp_path / "model.pth", tmp_path / "model.json"
    weights.write_bytes(b"weights")
    assert read_point(weights) is None
    card.write_text("{}")
    assert read_point(weights) is None
    point = chosen("f1")
    details = {"weights_sha256": sha256_file(weights), "operating_point": point.to_dict()}
    card.write_text(json.dumps(details))
    assert read_point(weights) == point
    weights.write_bytes(b"other weights")
    with pytest.raises(InputError, match="describes other weights"):
        read_point(weights)
    for broken in ("[]", "{", '{"operating_point": {"target": "f1"}}'):
        card.write_text(broken)
        with pytest.raises(InputError, match="cannot be read"):
            read_point(weights)


def test_calibration_is_the_gap_between_score_and_share() -> None:
    perfect = calibration(evidence([[0.75] * 4], [[1, 1, 1, 0]], [4]))
    assert perfect.ece == pytest.approx(0.0)
    sure = calibration(
        evidence([[0.95] * 4 + [0.15] * 4 + [0.01] * 9], [[1, 1, 0, 0] + [0] * 13], [4])
    )
    assert [(b.low, b.detections, b.precision) for b in sure.bins] == [(0.1, 4, 0.0), (0.9, 4, 0.5)]
    assert sure.ece == pytest.approx((0.45 * 4 + 0.15 * 4) / 8)
    assert calibration(evidence([[0.01]], [[0]], [1])).ece is None
