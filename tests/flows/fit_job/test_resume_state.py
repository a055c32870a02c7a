"""Resume state: one folder per fingerprint, one holder, no endless crash loop; digests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.core import digest
from flows.core.digest import path_digest
from flows.core.locks import BusyError, locked
from flows.fit_job.resume_state import AttemptsError, FitState


def test_every_input_has_its_own_folder(tmp_path: Path) -> None:
    first = FitState(tmp_path, {"fit": {"lr": 1.0}, "data": "a"})
    assert FitState(tmp_path, {"data": "a", "fit": {"lr": 1.0}}).folder == first.folder
    assert FitState(tmp_path, {"data": "a", "fit": {"lr": 2.0}}).folder != first.folder


def test_a_second_trainer_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from flows.core.locks import locked\n"
    code += f"with locked(Path({str(tmp_path)!r})): print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with pytest.raises(BusyError, match=f"pid {holder.pid} on"), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        pass


def test_three_attempts_without_a_new_epoch_end_the_loop(tmp_path: Path) -> None:
    state = FitState(tmp_path, {})
    state.log_file.write_text("".join(f"line {i}\n" for i in range(50)))
    for expected in (1, 2, 3):
        assert state.begin_attempt().attempts == expected
    with pytest.raises(AttemptsError, match="line 49") as caught:
        state.begin_attempt()
    assert "line 19\n" not in str(caught.value)
    assert "--retry" in str(caught.value)


def test_a_finished_epoch_or_a_stop_on_request_does_not_count(tmp_path: Path) -> None:
    state = FitState(tmp_path, {})
    for epoch in range(1, 7):
        assert state.begin_attempt().attempts == 1
        state.update(finished_epochs=epoch)
    for _ in range(5):
        state.begin_attempt()
        state.forgive_attempt()
    assert state.begin_attempt().attempts == 1


def test_an_unfinished_training_of_other_code_is_named(tmp_path: Path) -> None:
    inputs = {"fit": {"lr": 1.0}, "data": "a", "initial": "i", "code": "old"}
    old = FitState(tmp_path, inputs)
    old.begin_attempt()
    newer = {**inputs, "fit": {"lr": 1.0, "added_later": None}, "code": "new"}
    assert FitState(tmp_path, newer).superseded() == (old.folder, ["the code"])
    assert FitState(tmp_path, {**newer, "initial": "j"}).superseded() == (
        old.folder, ["the code", "the starting weights"],
    )  # fmt: skip
    assert FitState(tmp_path, {**newer, "fit": {"lr": 2.0}}).superseded() is None
    assert FitState(tmp_path, {**newer, "data": "b"}).superseded() is None
    old.mark_done()
    assert FitState(tmp_path, newer).superseded() is None


def test_an_unreadable_record_is_replaced(tmp_path: Path) -> None:
    state = FitState(tmp_path, {})
    state.update(seconds=5.0)
    assert FitState(tmp_path, {}).read().seconds == 5.0
    state.record_file.write_text("{")
    assert state.read().seconds == 0.0


def test_the_digest_follows_names_and_contents_only(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x.txt").write_text("1")
    first = path_digest(folder)
    os.utime(folder / "a" / "x.txt", (1, 1))
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("compiled")
    assert path_digest(folder) == first
    (folder / "a" / "x.txt").write_text("2")
    changed = path_digest(folder)
    (folder / "a" / "x.txt").rename(folder / "a" / "y.txt")
    assert len({first, changed, path_digest(folder)}) == 3


def test_unchanged_files_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, memory = tmp_path / "set", tmp_path / "digests.db"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(str(number))
    first = path_digest(folder, memory)
    read: list[str] = []
    real = digest.sha256_file
    monkeypatch.setattr(digest, "sha256_file", lambda p: read.append(p.name) or real(p))
    (folder / "7.txt").write_text("other")
    assert path_digest(folder, memory) != first
    assert read == ["7.txt"]
