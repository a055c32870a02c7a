"""A resumed fit continues its run in every logger, and a new fit starts a new one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.training.helpers import Run, StopAt, tiny_model, tiny_run
from tests.unit.training.processes import run as run_script


def scalars(folder: Path, tag: str) -> list[int]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [event.step for event in accumulator.Scalars(tag)]


def test_tensorboard_continues_and_drops_what_is_abandoned(shapes: Path, tmp_path: Path) -> None:
    config = tiny_run(shapes, tmp_path, tensorboard=True, checkpoint_interval=1)
    Run(tiny_model(), config).fit()
    first = scalars(tmp_path, "val/loss")
    assert len(first) == 2
    resumed = Run(tiny_model(), config.model_copy(update={"epochs": 3}))
    resumed.fit(tmp_path / "checkpoint_0.ckpt")  # the second epoch is trained again
    steps = scalars(tmp_path, "val/loss")
    assert steps == [*first, first[1] + first[1] - first[0]]
    Run(tiny_model(), config.model_copy(update={"epochs": 1})).fit()
    assert scalars(tmp_path, "val/loss") == first[:1]
    assert scalars(tmp_path / "tensorboard_1", "val/loss") == steps


def wandb_ids(output: Path) -> list[str]:
    """Ids of the run folders, oldest first."""
    folders = sorted((output / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_mtime_ns)
    return [folder.name.rsplit("-", 1)[1] for folder in folders]


@pytest.mark.slow
def test_wandb_continues_its_run_in_another_process(shapes: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {"dataset": shapes, "output": tmp_path}
    job |= {"config": {"wandb": True, "project": "p"}, "environment": {"WANDB_MODE": "offline"}}
    status, text = run_script({**job, "stop_step": 7})
    assert status != 0
    assert "stopped by the test" in text
    status, text = run_script({**job, "resume": tmp_path / "last.ckpt"})
    assert status == 0, text
    first, resumed = wandb_ids(tmp_path)
    assert resumed == first
    assert run_script(job)[0] == 0
    assert wandb_ids(tmp_path)[-1] != first


def test_fits_of_one_process_have_their_own_wandb_runs(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")  # no service; ids and init are real
    ids = []
    try:
        for name in ("a", "b"):
            fields = {"wandb": True, "project": "p", "epochs": 1}
            run = Run(tiny_model(), tiny_run(shapes, tmp_path / name, **fields)).fit()
            ids.append(run.trainer.loggers[-1].experiment.id)
        again = tiny_run(shapes, tmp_path / "a", wandb=True, project="p")
        resumed = Run(tiny_model(), again).fit(tmp_path / "a" / "last.ckpt")
        assert ids[0] != ids[1]
        assert resumed.trainer.loggers[-1]._wandb_init["id"] == ids[0]
    finally:
        wandb.finish()


def best(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((output / "best_model.json").read_text())
    return record


def epoch_of(file: Path) -> int:
    return int(torch.load(file, weights_only=True)["epoch"])


def better_each_epoch(run: Run) -> Run:
    """Validation values that rise, so that every epoch is the best one so far."""
    original = run.module.log

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if name in {"val/mAP_50_95", "val/ema_mAP_50_95"}:
            value = torch.tensor(0.1 * (run.trainer.current_epoch + 1), dtype=torch.float64)
        original(name, value, *args, **kwargs)

    run.module.log = log  # type: ignore[method-assign]
    return run


def test_rewinding_abandons_newer_best_files(shapes: Path, tmp_path: Path) -> None:
    config = tiny_run(shapes, tmp_path, epochs=3, checkpoint_interval=1)
    better_each_epoch(Run(tiny_model(), config)).fit()
    regular = tmp_path / "checkpoint_best_regular.pth"
    assert (epoch_of(regular), best(tmp_path)["epoch"]) == (2, 2)
    rewound = better_each_epoch(Run(tiny_model(), config))
    rewound.trainer.callbacks.append(StopAt(rewound_step(tmp_path) + 1))
    with (
        pytest.warns(UserWarning, match="older than the best models .*abandoned_1"),
        pytest.raises(RuntimeError, match="stopped by the test"),
    ):
        rewound.fit(tmp_path / "checkpoint_1.ckpt")
    assert epoch_of(tmp_path / "abandoned_1" / regular.name) == 2
    assert (epoch_of(regular), best(tmp_path)["epoch"]) == (1, 1)
    stored = torch.load(regular, weights_only=True)["model"]["class_embed.bias"]
    checkpoint = torch.load(tmp_path / "checkpoint_1.ckpt", weights_only=True)
    assert torch.equal(stored, checkpoint["state_dict"]["model.class_embed.bias"])


def rewound_step(output: Path) -> int:
    return int(torch.load(output / "checkpoint_1.ckpt", weights_only=True)["global_step"])


def test_a_best_epoch_whose_weights_are_gone_is_forgotten(shapes: Path, tmp_path: Path) -> None:
    """Epoch 0 was the best at checkpoint 1; its file has been replaced since."""
    config = tiny_run(shapes, tmp_path, epochs=3, checkpoint_interval=1)
    run = Run(tiny_model(), config)
    original = run.module.log

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if name in {"val/mAP_50_95", "val/ema_mAP_50_95"}:
            value = torch.tensor([0.5, 0.1, 0.9][run.trainer.current_epoch], dtype=torch.float64)
        original(name, value, *args, **kwargs)

    run.module.log = log  # type: ignore[method-assign]
    run.fit()
    rewound = Run(tiny_model(), config)
    rewound.trainer.callbacks.append(StopAt(rewound_step(tmp_path) + 1))
    with (
        pytest.warns(UserWarning, match="is abandoned"),
        pytest.raises(RuntimeError, match="stopped by the test"),
    ):
        rewound.fit(tmp_path / "checkpoint_1.ckpt")
    assert not list(tmp_path.glob("checkpoint_best_*.pth"))
    assert not (tmp_path / "best_model.json").exists()
    assert rewound.trainer.checkpoint_callback.best_model_path == ""


def test_resuming_the_latest_checkpoint_keeps_the_best_files(shapes: Path, tmp_path: Path) -> None:
    config = tiny_run(shapes, tmp_path)
    Run(tiny_model(), config).fit()
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path, kept)
    Run(tiny_model(), config.model_copy(update={"epochs": 3})).fit(tmp_path / "last.ckpt")
    assert not list(tmp_path.glob("abandoned_*"))
    assert best(tmp_path)["value"] >= best(kept)["value"]
