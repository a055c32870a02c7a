"""The estimate before a training: from the first batches, early enough when they are slow."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rfdetr.training.callbacks import progress_lines
from rfdetr.training.callbacks.progress_lines import ProgressLines


@pytest.mark.parametrize(
    ("seconds", "after", "said"),
    [
        ([9.0, 2.0, 2.0] + [1.0] * 20, 15, "about 2m 5s for 5 epochs of 20 batches, at 1 s"),
        ([15.0] * 10, 3, "about 31m 15s for 5 epochs of 20 batches, at 15 s"),
        ([60.0] * 4, 2, "about 2h 5m 0s for 5 epochs of 20 batches, at 60 s"),
    ],
    ids=["fast", "slow", "very slow"],
)
def test_the_expected_duration_is_told_once(
    seconds: list[float],
    after: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    monkeypatch.setattr(progress_lines.time, "monotonic", lambda: now)
    trainer: Any = SimpleNamespace(
        current_epoch=0, max_epochs=5, num_training_batches=20, num_val_batches=[10], local_rank=0
    )
    lines = ProgressLines()
    lines.on_train_start(trainer)
    told = []
    for taken in seconds:
        now += taken
        lines.on_train_batch_end(trainer)
        told.append(capsys.readouterr().out)
    assert said in told[after - 1]
    assert [number for number, text in enumerate(told, 1) if text] == [after]
