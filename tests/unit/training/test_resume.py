"""A resumed run equals an uninterrupted one, bit by bit."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.datasets import make_roboflow
from tests.unit.training.helpers import Run, StopAt, tiny_model, tiny_run

EPOCHS, BATCHES = 3, 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_roboflow(tmp_path_factory.mktemp("data"), splits={"train": 10, "valid": 3})


@pytest.fixture(scope="module")
def uninterrupted(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run without an interruption, trained once for each set of `fields`."""
    done: dict[str, Path] = {}

    def train(**fields: int) -> Path:
        if (key := str(sorted(fields.items()))) not in done:
            done[key] = tmp_path_factory.mktemp("uninterrupted")
            Run(tiny_model(), tiny_run(dataset, done[key], **options(**fields))).fit()
        return done[key]

    return train


def options(**fields):
    return {
        "epochs": EPOCHS,
        "multi_scale": True,
        "drop_path": 0.2,
        "drop_schedule": "linear",
        "lr_scheduler": "cosine",
        "warmup_epochs": 0.5,
        **fields,
    }


def interrupted(
    dataset: Path, output: Path, step: int, every: int | None, start: Path | None = None, **fields
) -> Path:
    """Train, from `start` on, until a crash after `step` steps; the checkpoint that is left."""
    run = Run(tiny_model(), tiny_run(dataset, output, **options(**fields)))
    for callback in run.trainer.callbacks:
        if hasattr(callback, "every_n_steps"):
            callback.every_n_steps = every
    run.trainer.callbacks.append(StopAt(step))
    with pytest.raises(RuntimeError, match="stopped by the test"):
        run.fit(start)
    return output / "last.ckpt"


def equal(first, second, path="") -> None:
    assert type(first) is type(second), path
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            equal(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), path
        for i, pair in enumerate(zip(first, second, strict=True)):
            equal(*pair, f"{path}[{i}]")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    else:
        assert first == second, path


def assert_same_end(reference: Path, resumed: Path) -> None:
    """Last checkpoints are equal in everything that training depends on, and so is the history."""
    ends = [torch.load(p / "last.ckpt", weights_only=True) for p in (reference, resumed)]
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "callbacks")
    for part in parts:
        equal(ends[0][part], ends[1][part], part)
    equal(ends[0]["rfdetr_resume"]["random"], ends[1]["rfdetr_resume"]["random"], "random")
    assert history(reference) == history(resumed)


def history(output: Path) -> list[dict[str, str]]:
    with open(output / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize(
    ("step", "every", "workers"),
    [
        (BATCHES + 2, None, 0),
        (BATCHES + 4, 2, 2),
        pytest.param(BATCHES + 2, None, 2, marks=pytest.mark.slow),
        pytest.param(BATCHES + 4, 2, 0, marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted(dataset, uninterrupted, tmp_path, step, every, workers):
    fields = {"num_workers": workers, "grad_accum_steps": 2} if workers else {}
    reference = uninterrupted(**fields)
    last = interrupted(dataset, tmp_path, step, every, **fields)
    saved = torch.load(last, weights_only=True)["global_step"]
    assert saved == (BATCHES if every is None else BATCHES + 3)
    Run(tiny_model(), tiny_run(dataset, tmp_path, **options(**fields))).fit(last)
    assert_same_end(reference, tmp_path)


def test_interrupted_again_right_after_a_resume(dataset, uninterrupted, tmp_path):
    """The second checkpoint has the epoch's sums from before the first interruption too."""
    reference = uninterrupted()
    first = interrupted(dataset, tmp_path, BATCHES + 2, 1)
    second = interrupted(dataset, tmp_path, BATCHES + 3, 1, first)
    Run(tiny_model(), tiny_run(dataset, tmp_path, **options())).fit(second)
    assert_same_end(reference, tmp_path)
