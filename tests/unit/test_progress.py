"""The progress line: one form, read back by other processes."""

from __future__ import annotations

import math

import pytest

from rfdetr.progress import EpochProgress, duration


@pytest.mark.parametrize(
    ("progress", "line"),
    [
        (EpochProgress(3, 50, 4.15, 0.61, 72), "epoch 3/50  loss 4.1500  mAP 0.6100  1m 12s left"),
        (EpochProgress(1, 9, None, None, 7384), "epoch 1/9  loss -  mAP -  2h 3m 4s left"),
        (EpochProgress(2, 3, 1e-5, 0.0, 0), "epoch 2/3  loss 0.0000  mAP 0.0000  0s left"),
        (EpochProgress(3, 3, 4.15, 0.61), "epoch 3/3  loss 4.1500  mAP 0.6100"),
    ],
)
def test_a_line_is_read_back(progress: EpochProgress, line: str) -> None:
    assert progress.line() == line
    found = EpochProgress.parse(f"{line}\n")
    assert found is not None
    assert found.line() == line
    assert (found.epoch, found.of, found.left_s) == (progress.epoch, progress.of, progress.left_s)


def test_a_loss_that_is_not_finite_is_reported() -> None:
    found = EpochProgress.parse(EpochProgress(1, 2, math.nan, 0.1, 5).line())
    assert found is not None
    assert found.loss is not None
    assert math.isnan(found.loss)


@pytest.mark.parametrize("line", ["", "epoch 3", "epoch 1/2  loss x  mAP y", "epoch 1/2  loss 1"])
def test_other_lines_are_none(line: str) -> None:
    assert EpochProgress.parse(line) is None


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 3600, 90061)] == ["0s", "1m 0s", "1h 0m 0s", "25h 1m 1s"]
