"""Flow runs on one machine use different GPUs. The GPUs here are simulated."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flows.config.environment import Environment
from flows.orchestration import gpus
from flows.project.project import Project
from tests.flows.projects import ROOT, environment, write_params

HOLDER = """
import sys, time
from pathlib import Path
from flows.orchestration import gpus
gpus._uuids = lambda: ["GPU-a", "GPU-b", "GPU-c"]
with gpus.claimed(2, Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_uuids", lambda: ["GPU-a", "GPU-b", "GPU-c"])
    monkeypatch.setattr(gpus, "RETRY_S", 0.01)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)


def visible_to_children() -> str:
    code = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))"
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


def test_runs_see_different_gpus_and_everything_is_as_before_at_the_end(tmp_path: Path) -> None:
    with gpus.claimed(2, tmp_path):
        assert visible_to_children() == "0,1"
    assert gpus.VISIBLE not in os.environ
    with gpus.claimed(9, tmp_path):
        assert visible_to_children() == "0,1,2"
    assert visible_to_children() == "all"


def test_only_what_the_environment_leaves_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gpus.VISIBLE, "2,GPU-a")
    with gpus.claimed(1, tmp_path):
        assert visible_to_children() == "2"
    assert os.environ[gpus.VISIBLE] == "2,GPU-a"


def test_a_machine_without_gpus_has_nothing_to_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "_uuids", list)
    with gpus.claimed(1, tmp_path):
        assert visible_to_children() == "all"
    assert list(tmp_path.iterdir()) == []


BY_HAND = """
import sys
from pathlib import Path
from flows.config.environment import Environment
from flows.orchestration import gpus
from flows.project.project import Project
gpus._uuids = lambda: ["GPU-a", "GPU-b", "GPU-c"]
env = Environment.read({"RFDETR_STATE_DIR": sys.argv[2]})
with gpus.gpu_of_command(Project(Path(sys.argv[1]), env)):
    import os; print(os.environ.get("CUDA_VISIBLE_DEVICES"))
"""


@pytest.mark.parametrize(("accelerator", "seen"), [("auto", "0"), ("cpu", "None")])
def test_a_command_by_hand_claims_a_gpu_unless_it_runs_for_a_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accelerator: str, seen: str
) -> None:
    write_params(tmp_path, runtime={"accelerator": accelerator})
    project = Project(tmp_path, Environment.read({"RFDETR_STATE_DIR": str(tmp_path / "state")}))
    command = [sys.executable, "-c", BY_HAND, str(tmp_path), str(tmp_path / "state")]

    def by_hand() -> str:
        env = environment(tmp_path, PYTHONPATH=str(ROOT))
        if gpus.HELD not in env:  # started elsewhere, not by this process
            env.pop(gpus.VISIBLE, None)
        return subprocess.check_output(command, text=True, env=env, timeout=60).strip()

    assert by_hand() == seen
    if accelerator == "cpu":
        return
    with gpus.claimed(1, tmp_path / "state"):
        assert by_hand() == "1", "GPU 0 is in use"
    with gpus.gpu_slot(project, 1):
        assert by_hand() == "0", "a child of the holder uses the holder's GPU, and does not wait"
    assert gpus.HELD not in os.environ


def test_one_gpu_has_one_lock_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By index, by identifier, or as the only GPU of a container."""
    with gpus.claimed(1, tmp_path):
        assert [file.name for file in (tmp_path / "gpus").iterdir()] == ["GPU-a"]
        monkeypatch.setenv(gpus.VISIBLE, "GPU-a,GPU-b")
        with gpus.claimed(1, tmp_path):
            assert os.environ[gpus.VISIBLE] == "GPU-b"


def test_a_run_waits_for_the_gpus_of_another_until_that_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "ready\n"
    got: list[str] = []

    def second() -> None:
        with gpus.claimed(2, tmp_path):
            got.append(os.environ[gpus.VISIBLE])

    waiting = threading.Thread(target=second)
    waiting.start()
    waiting.join(0.3)
    assert got == [], "one GPU is free, two are wanted"
    with gpus.claimed(1, tmp_path):  # the one that waits holds nothing meanwhile
        assert os.environ[gpus.VISIBLE] == "2"
    holder.kill()
    holder.wait()
    waiting.join(30)
    assert got == ["0,1"]
