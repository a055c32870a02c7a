"""What is written when, by which thread, and that it is what a plain write gives."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rfdetr.checkpoints import lightning_io
from rfdetr.checkpoints.lightning_io import LegacyCheckpointIO, WriteBeside, snapshot
from rfdetr.training.beside import Beside
from rfdetr.training.callbacks import best_model
from rfdetr.training.callbacks.checkpoints import CheckpointCallback
from tests.unit.training.helpers import Run, tiny_model, tiny_run
from tests.unit.training.test_resume import equal


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, threading.Thread]]:
    """Names and threads of the full checkpoints that are written."""
    found: list[tuple[str, threading.Thread]] = []
    save = lightning_io.save_file

    def recorded(content: Any, path: Any) -> None:
        found.append((Path(path).name, threading.current_thread()))
        save(content, path)

    monkeypatch.setattr(lightning_io, "save_file", recorded)
    return found


def names(written: list[tuple[str, threading.Thread]]) -> list[str]:
    return [name for name, _ in written]


def test_a_snapshot_stays_what_it_was() -> None:
    layer = torch.nn.Linear(3, 2)
    shared = torch.arange(6.0)
    given = {
        "state_dict": layer.state_dict(),
        "parts": [shared[:3], shared[3:], (torch.tensor(1), "text")],
        "empty": torch.empty(0, 4),
        "numbers": {"a": [1, 2]},
    }
    expected = {name: value.clone() for name, value in layer.state_dict().items()}
    copied = snapshot(given)
    assert copied["state_dict"]._metadata == given["state_dict"]._metadata
    assert type(copied["state_dict"]) is type(given["state_dict"])
    with torch.no_grad():
        layer.weight.zero_()
        shared.zero_()
    given["numbers"]["a"].append(3)
    assert all(torch.equal(copied["state_dict"][k], v) for k, v in expected.items())
    assert copied["numbers"] == {"a": [1, 2]}
    assert copied["empty"].shape == (0, 4)
    first, second, rest = copied["parts"]
    assert torch.cat([first, second]).tolist() == [0, 1, 2, 3, 4, 5]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert rest == (torch.tensor(1), "text")


def test_a_write_beside_gives_the_file_of_a_plain_write(tmp_path: Path) -> None:
    layer = torch.nn.Linear(30, 20)
    content = {"state_dict": layer.state_dict(), "pytorch-lightning_version": "2", "epoch": 1}
    io, beside = LegacyCheckpointIO(), Beside("test")
    io.save_checkpoint(content, tmp_path / "plain.ckpt")
    gate = threading.Event()
    beside.run(gate.wait, 10)
    started: list[Any] = []
    beside_run = lambda *call: started.append(call)  # noqa: E731
    io.save_checkpoint(content, tmp_path / "a.ckpt", WriteBeside(beside_run, tmp_path / "b.ckpt"))
    assert not (tmp_path / "a.ckpt").exists()  # not written by this thread
    with torch.no_grad():
        layer.weight.zero_()
    gate.set()
    beside.run(*started[0])
    beside.finish()
    plain = torch.load(tmp_path / "plain.ckpt")
    for name in ("a.ckpt", "b.ckpt"):
        equal(torch.load(tmp_path / name), plain)
    assert (tmp_path / "a.ckpt").stat().st_ino == (tmp_path / "b.ckpt").stat().st_ino
    io.save_checkpoint({"epoch": 2}, tmp_path / "a.ckpt")
    equal(torch.load(tmp_path / "b.ckpt"), plain)
    with pytest.raises(TypeError, match="not supported"):
        io.save_checkpoint(content, tmp_path / "c.ckpt", {"a": 1})


def test_training_continues_while_the_checkpoint_is_written(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of an epoch ends after the first step of the next one."""
    first_step = threading.Event()
    save, seen = lightning_io.save_file, []

    def waiting(content: Any, path: Any) -> None:
        seen.append(first_step.wait(20) or content["epoch"] > 0)
        save(content, path)

    monkeypatch.setattr(lightning_io, "save_file", waiting)
    run = Run(tiny_model(), tiny_run(shapes, tmp_path))

    module_hook = run.module.on_train_batch_start

    def on_start(batch: Any, index: int) -> None:
        if run.trainer.current_epoch == 1:
            first_step.set()
        module_hook(batch, index)

    run.module.on_train_batch_start = on_start
    run.fit()
    assert seen == [True, True]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 5),
        ({"last_ckpt_epochs": 2}, 3),  # epochs 2, 4 and the last one
        ({"last_ckpt_minutes": 60}, 1),  # the last one
        ({"last_ckpt_minutes": 60, "checkpoint_interval": 2}, 3),
    ],
)
def test_how_often_the_last_checkpoint_is_written(
    shapes: Path, tmp_path: Path, written: Any, fields: dict[str, Any], expected: int
) -> None:
    config = tiny_run(shapes, tmp_path, epochs=5, use_ema=False, **fields)
    run = Run(tiny_model(), config, limit_train_batches=1, limit_val_batches=0).fit()
    assert names(written) == ["last.ckpt"] * expected
    assert threading.main_thread() not in [thread for _, thread in written]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 4
    kept = sorted(path.name for path in tmp_path.glob("checkpoint_*.ckpt"))
    assert kept == (
        ["checkpoint_1.ckpt", "checkpoint_3.ckpt"] if "checkpoint_interval" in fields else []
    )
    (callback,) = (c for c in run.trainer.callbacks if isinstance(c, CheckpointCallback))
    assert callback.every_minutes == max(5, fields.get("last_ckpt_minutes", 0))


def test_a_write_that_fails_ends_the_run(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lightning_io, "save_file", full)
    run = Run(tiny_model(), tiny_run(shapes, tmp_path))
    with pytest.raises(OSError, match="No space left"):
        run.fit()


def recorder(name: str, original: Any, calls: list[str]) -> Any:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        path = args[1] if name == "save_file" else args[0]
        calls.append(f"{name} {Path(path).name}")
        return original(*args, **kwargs)

    return recorded


def test_a_best_file_is_written_and_verified_once(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("save_file", "verify_file", "load_file"):
        original = getattr(best_model, name)

        def recorded(
            *args: Any, _name: str = name, _original: Any = original, **kwargs: Any
        ) -> Any:
            path = args[1] if _name == "save_file" else args[0]
            calls.append(f"{_name} {Path(path).name}")
            return _original(*args, **kwargs)

        monkeypatch.setattr(best_model, name, recorded)
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, use_ema=False))
    values = iter([0.1, 0.3])
    (best,) = (c for c in run.trainer.callbacks if isinstance(c, best_model.BestModelCallback))
    best._metrics.read = lambda _trainer, name: None if "ema" in name else next(values)
    run.fit()
    once = [
        "save_file checkpoint_best_regular.pth",
        "verify_file checkpoint_best_regular.pth",
        "save_file checkpoint_best_total.pth",
        "verify_file checkpoint_best_total.pth",
    ]
    assert calls == once * 2
    total = torch.load(tmp_path / best_model.TOTAL, weights_only=True)
    regular = torch.load(tmp_path / best_model.REGULAR, weights_only=True)
    equal(total["model"], regular["model"])
    assert total["best_total_source"] == "regular"
    assert "epoch" not in total


def with_scores(run: Run, *scores: float) -> Run:
    """`run` with these values of both metrics."""
    (best,) = (c for c in run.trainer.callbacks if isinstance(c, best_model.BestModelCallback))
    live, ema = iter(scores), iter(scores)
    best._metrics.read = lambda _trainer, name: next(ema if "ema" in name else live)
    return run


def test_best_files_that_a_killed_run_has_not_written_are_restored(
    shapes: Path, tmp_path: Path
) -> None:
    """last.ckpt was complete and the best files of the same epoch were not."""
    files = (best_model.REGULAR, best_model.EMA, best_model.TOTAL)
    with_scores(Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=1)), 0.1).fit()
    old = {name: (tmp_path / name).read_bytes() for name in files}
    last = tmp_path / "last.ckpt"
    with_scores(Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=2)), 0.2).fit(last)
    expected = {name: torch.load(tmp_path / name, weights_only=True) for name in files}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    with_scores(Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=3)), 0.15).fit(last)
    for name in files:
        found = torch.load(tmp_path / name, weights_only=True)
        equal(found["model"], expected[name]["model"])
        assert found["value"] == 0.2


def test_the_total_file_is_left_alone_if_the_other_weights_improve(
    shapes: Path, tmp_path: Path
) -> None:
    run = Run(tiny_model(), tiny_run(shapes, tmp_path, epochs=3))
    live, ema = iter([0.1, 0.2, 0.6]), iter([0.5, 0.4, 0.3])
    (best,) = (c for c in run.trainer.callbacks if isinstance(c, best_model.BestModelCallback))
    best._metrics.read = lambda _trainer, name: next(ema if "ema" in name else live)
    times: list[float] = []
    original = best._write

    def recorded(*args: Any) -> None:
        time.sleep(0.02)
        original(*args)
        times.append((tmp_path / best_model.TOTAL).stat().st_mtime)

    best._write = recorded
    run.fit()
    assert times[0] == times[1] < times[2]
    total = torch.load(tmp_path / best_model.TOTAL, weights_only=True)
    assert total["best_total_source"] == "regular"
    assert total["value"] == 0.6
