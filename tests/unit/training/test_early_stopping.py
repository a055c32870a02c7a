from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rfdetr.training.callbacks.early_stopping import RFDETREarlyStopping
from rfdetr.training.callbacks.fresh_metrics import FreshMetrics


def stopping_cases():
    path = Path(__file__).parents[2] / "parity/training/selection.json"
    return [case for case in json.loads(path.read_text())["cases"] if "patience" in case["options"]]


@pytest.mark.parametrize("case", stopping_cases(), ids=lambda case: case["name"])
def test_training_ends_where_the_reference_ends(case):
    callback = RFDETREarlyStopping(**case["options"])
    ema_values = case["ema"] or [None] * len(case["regular"])
    epochs = 0
    for regular, ema in zip(case["regular"], ema_values, strict=True):
        epochs += 1
        if callback.observe(regular, ema):
            break
    assert epochs == case["result"]["epochs_run"]


def test_epochs_without_metrics_count_for_nothing():
    callback = RFDETREarlyStopping(patience=2)
    stops = [callback.observe(value, None) for value in (0.5, None, 0.4, None, None, 0.4)]
    assert stops == [False, False, False, False, False, True]


def test_state_survives_a_resume():
    first = RFDETREarlyStopping(patience=2)
    first.observe(0.5, None)
    first.observe(0.4, None)
    second = RFDETREarlyStopping(patience=2)
    second.load_state_dict(first.state_dict())
    assert second.observe(0.4, None)


def test_old_undefined_and_infinite_values_are_not_read():
    metrics = FreshMetrics(["val/mAP_50_95"])
    trainer = SimpleNamespace(callback_metrics={"val/mAP_50_95": torch.tensor(0.4)})
    metrics.start(trainer)
    assert metrics.read(trainer, "val/mAP_50_95") is None
    for value, expected in ((0.4, 0.4), (-1.0, None), (float("nan"), None), (0.0, 0.0)):
        trainer.callback_metrics["val/mAP_50_95"] = torch.tensor(value, dtype=torch.float64)
        assert metrics.read(trainer, "val/mAP_50_95") == expected
