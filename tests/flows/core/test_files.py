"""Folders and files that are replaced in one step, YAML as DVC reads it, locks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows.core import locks
from flows.core.files import parse_yaml, read_json, read_yaml, write_csv
from flows.core.locks import BusyError, locked
from rfdetr.errors import ConfigError
from rfdetr.files import new_folder

ROOT = Path(__file__).parents[3]


def test_a_folder_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a" / "out"
    with new_folder(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "two").write_text("2")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["one"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from rfdetr.files import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "my [out]"
    subprocess.run([sys.executable, "-c", KILLED, target], check=False, cwd=ROOT)
    assert len(list(tmp_path.glob("*/half"))) == 1
    with new_folder(target) as running:
        assert list(tmp_path.glob(".*.partial")) == [running]
        with new_folder(target) as other:  # leaves a running one alone
            assert running.is_dir() and list(other.iterdir()) == []
    assert list(tmp_path.iterdir()) == [target]


def test_yaml_has_dvcs_meaning() -> None:
    assert parse_yaml("{a: 1e-3, b: 010, c: 'no', d: ~}", origin="x") == {
        "a": 0.001, "b": 10, "c": "no", "d": None,
    }  # fmt: skip


def test_a_missing_or_broken_yaml_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml is missing"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match=r"a\.yaml is not valid YAML"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("a:\n  - [1")
    with pytest.raises(ConfigError, match=r"not valid YAML: .* \(line \d+, column \d+\)\.$"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("fit:\n\tepochs: 5\n")
    with pytest.raises(ConfigError, match="Indent with spaces, not with tabs"):
        read_yaml(tmp_path / "a.yaml")


def test_a_table_has_its_header_also_without_rows(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [], ["x", "y"])
    assert (tmp_path / "a.csv").read_text().split() == ["x,y"]
    write_csv(tmp_path / "a.csv", [{"x": 1, "y": 2}])
    assert (tmp_path / "a.csv").read_text().split() == ["x,y", "1,2"]


def test_a_lock_names_its_holder_and_is_free_afterwards(tmp_path: Path) -> None:
    with locked(tmp_path / "a"):
        name = rf"a is in use by pid {os.getpid()} on"
        with pytest.raises(BusyError, match=name), locked(tmp_path / "a"):
            pass
        with locked(tmp_path / "b"):
            pass
    with locked(tmp_path / "a"):
        pass


def test_who_waits_for_a_lock_says_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "QUIET_SECONDS", 0.05)
    entered = threading.Event()

    def wait() -> None:
        with locked(tmp_path, wait=True):
            entered.set()

    waiting = threading.Thread(target=wait, daemon=True)
    with locked(tmp_path):
        waiting.start()
        while f"is in use by pid {os.getpid()}" not in caplog.text:
            assert waiting.is_alive()
            time.sleep(0.01)
        assert not entered.is_set()
    waiting.join(10)
    assert entered.is_set()


def test_a_pipe_in_the_place_of_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_yaml, read_json):
        with pytest.raises(OSError, match="not a regular file"):
            read(tmp_path / "pipe")
