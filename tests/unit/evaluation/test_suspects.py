"""Suspected labels: planted mistakes of every kind, and nothing where nothing is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from rfdetr.evaluation.box_table import EvaluationData, make_box_table
from rfdetr.evaluation.suspects import KINDS, Suspects, find_suspects

Box = tuple[float, float, float, float]
A: Box = (10.0, 10.0, 40.0, 40.0)
B: Box = (100.0, 100.0, 30.0, 30.0)


def _find(
    truth: list[tuple[int, Box, int]],
    detections: list[tuple[int, Box, int, float]],
    crowd: tuple[int, ...] = (),
) -> Suspects:
    return find_suspects(
        EvaluationData(
            np.arange(4),
            make_box_table(
                [row[0] for row in detections],
                [row[2] for row in detections],
                [row[1] for row in detections],
                score=[row[3] for row in detections],
            ),
            make_box_table(
                [row[0] for row in truth],
                [row[2] for row in truth],
                [row[1] for row in truth],
                crowd=[number in crowd for number in range(len(truth))],
            ),
        )
    )


def _strong(found: Suspects) -> list[tuple[str, int, int]]:
    strong = np.flatnonzero(found.suspicion >= 0.5)
    return [(KINDS[found.kind[i]], int(found.truth[i]), int(found.detection[i])) for i in strong]


def test_right_labels_are_not_suspected() -> None:
    truth = [(0, A, 1), (0, B, 2), (1, A, 1)]
    detections = [(0, A, 1, 0.9), (0, B, 2, 0.6), (0, B, 1, 0.3), (1, A, 1, 0.8)]
    assert _strong(_find(truth, detections)) == []


def test_wrong_class() -> None:
    found = _find([(0, A, 1), (0, B, 2)], [(0, A, 2, 0.9), (0, A, 1, 0.1), (0, B, 2, 0.9)])
    assert _strong(found) == [("wrong_class", 0, 0)]
    assert found.suspicion[0] == pytest.approx(0.9**2)


def test_a_class_that_the_model_hardly_sees_is_weak_evidence() -> None:
    found = _find([(0, A, 1), (1, A, 1)], [(0, A, 2, 0.06), (1, A, 2, 0.3)])
    assert [(int(t), float(s)) for t, s in zip(found.truth, found.suspicion, strict=True)] == [
        (1, 1.0),
        (0, pytest.approx(0.06 / 0.2)),
    ]


def test_missing() -> None:
    found = _find([(0, A, 1)], [(0, A, 1, 0.9), (0, B, 2, 0.8), (2, A, 1, 0.7)])
    assert _strong(found) == [("missing", -1, 1), ("missing", -1, 2)]
    assert found.suspicion[:2].tolist() == [0.8, 0.7]


def test_an_object_next_to_a_labelled_one_can_be_missing() -> None:
    beside = (40.0, 10.0, 40.0, 40.0)  # overlaps A
    found = _find([(0, A, 1)], [(0, A, 1, 0.9), (0, beside, 1, 0.8)])
    assert _strong(found) == [("missing", -1, 1)]


def test_a_second_detection_of_one_object_is_not_a_missing_label() -> None:
    nearly = (16.0, 14.0, 40.0, 40.0)
    found = _find([(0, A, 1)], [(0, A, 1, 0.9), (0, nearly, 1, 0.7), (0, nearly, 2, 0.6)])
    assert _strong(found) == []


@pytest.mark.parametrize("shift", [10.0, 20.0, 28.0])
def test_badly_placed(shift: float) -> None:
    shifted = (10.0 + shift, 10.0, 40.0, 40.0)
    found = _find([(0, shifted, 1), (1, A, 1)], [(0, A, 1, 0.95), (1, A, 1, 0.9)])
    assert (found.kind[0], found.truth[0], found.detection[0]) == (1, 0, 0)
    assert len(_strong(found)) == (shift > 10)


def test_two_labels_for_one_object() -> None:
    twice = (11.0, 10.0, 40.0, 40.0)
    found = _find([(0, A, 1), (0, twice, 1)], [(0, A, 1, 0.9)])
    assert _strong(found) == [("duplicate", 1, -1)]
    both_there = [(0, A, 1, 0.9), (0, twice, 1, 0.85)]
    assert _strong(_find([(0, A, 1), (0, twice, 1)], both_there)) == []


def test_an_undetected_label_is_suspicious_where_the_model_overlooks_little() -> None:
    truth = [(i % 4, (float(10 * i), 0.0, 8.0, 8.0), 1) for i in range(400)]
    detections = [(image, box, label, 0.9) for image, box, label in truth[1:]]
    found = _find(truth, detections)
    assert (KINDS[found.kind[0]], found.truth[0]) == ("spurious", 0)
    assert found.suspicion[0] > 0.5
    assert len(_find(truth, detections[::2])) == 0


def test_crowd_regions_hide_missing_labels() -> None:
    found = _find([(0, A, 1)], [(0, (12.0, 12.0, 10.0, 10.0), 1, 0.9)], crowd=(0,))
    assert _strong(found) == []


def test_empty() -> None:
    assert len(_find([], [])) == 0
    assert len(_find([(0, A, 1)], [])) == 0
    assert _strong(_find([], [(0, A, 1, 0.9)])) == [("missing", -1, 0)]
