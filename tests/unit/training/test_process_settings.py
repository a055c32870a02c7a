"""Settings of the process change when a trainer runs, and at no other time."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from rfdetr.training.callbacks import process_settings
from tests.unit.training.helpers import Run, StopAt, tiny_model, tiny_run


class Filters(pl.Callback):
    """Records the warning filters of a running fit."""

    def on_train_start(self, *args: Any) -> None:
        self.seen = [str(f[1] and f[1].pattern) for f in warnings.filters]


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per call of the allocator's setting."""
    calls: list[int] = []
    monkeypatch.setattr(process_settings, "keep_freed_memory", lambda: calls.append(1))
    return calls


@pytest.mark.parametrize("crash", [False, True])
def test_a_fit_tunes_the_allocator_and_restores_the_filters(
    shapes: Path, tmp_path: Path, tuned: list[int], crash: bool
) -> None:
    before = list(warnings.filters)
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1, run_test=True))
    run.module.model.eval()(torch.zeros(1, 3, 64, 64))
    assert (tuned, warnings.filters) == ([], before)
    filters = Filters()
    run.trainer.callbacks.extend([filters, *([StopAt(2)] if crash else [])])
    if crash:
        with pytest.raises(RuntimeError, match="stopped by the test"):
            run.fit()
    else:
        run.fit()
    assert any("transfer_batch_to_device" in pattern for pattern in filters.seen)
    assert (tuned, warnings.filters) == ([1], before)


def test_an_evaluation_leaves_the_allocator_alone(
    finished: Run, shapes: Path, tmp_path: Path, tuned: list[int]
) -> None:
    before = list(warnings.filters)
    run = Run(tiny_model(), tiny_run(shapes, tmp_path))
    run.trainer.validate(run.module, run.data, ckpt_path=finished.output / "last.ckpt")
    assert (tuned, warnings.filters) == ([], before)


def test_callbacks_are_completed_once_and_in_order(shapes: Path, tmp_path: Path) -> None:
    """Whatever list the user gives: EMA first, resume last."""
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1))
    given = list(run.trainer.callbacks)
    for _ in range(2):
        run.trainer.validate(run.module, run.data, verbose=False)
        names = [type(callback).__name__ for callback in run.trainer.callbacks]
        assert names[:2] == ["RFDETREMACallback", "ProcessSettings"]
        assert names[-1] == "ResumeCallback"
        assert [c for c in run.trainer.callbacks if c in given] == given
        assert len(names) == len(given) + 3
