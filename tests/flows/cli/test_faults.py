"""What the machine or a user did ends in success or in one text, never in a traceback.

By default each fault meets the command that it concerns most; the slow test drives every command
with every fault, as processes.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from flows.cli.main import main
from flows.core.errors import REPORT, explain
from rfdetr.tracking.local_store import follow_database
from tests.flows.prefect_fixtures import Retrained
from tests.flows.projects import ROOT

PICTURE = str(ROOT / "docs/detections.png")
Environ = dict[str, str | None]


def conflict(file: str) -> Callable[[Path], Environ]:
    def fault(root: Path) -> Environ:
        lines = (root / file).read_text().splitlines(keepends=True)
        (root / file).write_text("".join([lines[0], "<<<<<<< HEAD\n", *lines[1:]]))
        return {}

    return fault


def content(file: str, data: bytes) -> Callable[[Path], Environ]:
    def fault(root: Path) -> Environ:
        (root / file).write_bytes(data)
        return {}

    return fault


def folder(name: str) -> Callable[[Path], Environ]:
    def fault(root: Path) -> Environ:
        (root / name).unlink()
        (root / name).mkdir()
        return {}

    return fault


def replaced(name: str) -> Callable[[Path], Environ]:
    def fault(root: Path) -> Environ:
        shutil.rmtree(root / name)
        (root / name).write_text("")
        return {}

    return fault


def deleted_artifacts(root: Path) -> Environ:
    """The copy of the project has artifacts of its own, which are gone."""
    follow_database(f"sqlite:///{root / 'mlflow.db'}", copied=True)
    shutil.rmtree(root / "mlartifacts")
    return {}


def without(*names: str) -> Callable[[Path], Environ]:
    def fault(root: Path) -> Environ:
        for name in names:
            path = root / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {}

    return fault


def variables(**given: str | None) -> Callable[[Path], Environ]:
    return lambda _: given


def locked_database(root: Path) -> Environ:
    store = sqlite3.connect(root / "mlflow.db")
    store.execute("BEGIN EXCLUSIVE")
    LOCKS.append(store)
    return {}


LOCKS: list[sqlite3.Connection] = []


def damaged_journals(root: Path) -> Environ:
    for file in (root.parent / "state/fit").glob("*/journal.json*"):
        file.write_bytes(bytes(100))
    return {}


def odd_pictures(root: Path) -> Environ:
    (root / "found").mkdir()
    (root / "found/progress.jsonl").write_bytes(b"\0\0\0\0\n")
    (root / "incoming").mkdir()
    shutil.copy(PICTURE, root / "incoming")
    (root / "incoming/dangling.jpg").symlink_to("/nonexistent.jpg")
    (root / "incoming/loop.jpg").symlink_to("loop.jpg")
    (root / "incoming/folder.jpg").mkdir()
    return {}


def state_is_a_file(root: Path) -> Environ:
    (root.parent / "file").write_text("")
    return {"RFDETR_STATE_DIR": str(root.parent / "file")}


PREDICT = ["predict", PICTURE, "--out", "found", "--no-draw"]
INCOMING = ["predict", "incoming", "--out", "found", "--no-draw"]
NO_HOME = {"HOME": "/dev/null", "RFDETR_STATE_DIR": None, "XDG_CACHE_HOME": None}
S3 = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}

# fault -> what it does, the command that it concerns most, its status, and words of the answer
FAULTS: dict[str, tuple[Callable[[Path], Environ], list[str], int, str]] = {
    "conflict in params.yaml": (conflict("params.yaml"), ["plan"], 1, "merge conflict in line 2"),
    "conflict in dvc.lock": (conflict("dvc.lock"), ["plan"], 1, "merge conflict in line 2"),
    "broken dvc.yaml": (content("dvc.yaml", b"stages: ["), ["plan"], 1, "dvc.yaml is not valid"),
    "dvc.yaml without stages": (content("dvc.yaml", b"stages:\n"), ["plan"], 1, "has no `stages`"),
    "a folder for a file": (folder("mlflow.db"), ["history"], 1, "mlflow.db is not a file"),
    "a file for a folder": (replaced("models"), ["doctor"], 1, "models is not a folder"),
    "broken dvc.lock": (content("dvc.lock", b"schema: ["), ["plan"], 1, "dvc.lock"),
    "binary DVC settings": (content(".dvc/config.local", b"\x80"), ["plan"], 1, ".dvc: "),
    "database of zeros": (content("mlflow.db", bytes(9000)), ["history"], 1, "database"),
    "damaged model card": (
        content("models/trained/model.json", b"{"),
        ["register"],
        1,
        "model.json",
    ),
    "edited model card": (
        content("models/trained/model.json", b'{"weights": "model.pth"}'),
        ["register"],
        1,
        "model.json was edited",
    ),
    "edited numbers": (content("metrics/test.json", b"[]"), ["register"], 1, "test.json was"),
    "edited record": (content("reports/verdict.json", b"{}"), ["retrain"], 1, "verdict.json was"),
    "empty pointer": (content("data/demo.dvc", b"outs: []"), ["register"], 1, "names no hash"),
    "damaged git configuration": (content(".git/config", b"[core\n"), ["plan"], 1, "git: "),
    "no git": (without(".git"), ["plan"], 0, "up to date"),
    "no models": (without("models"), ["register"], 1, "missing"),
    "deleted artifacts": (deleted_artifacts, PREDICT, 1, "files are missing"),
    "damaged journals": (damaged_journals, ["sync"], 0, ""),
    "odd pictures": (odd_pictures, INCOMING, 0, "3 files are not images"),
    "out is a file": (content("found", b""), PREDICT, 1, "choose another --out"),
    "state is a file": (state_is_a_file, ["doctor"], 1, "cannot be written"),
    "no home": (variables(**NO_HOME), ["doctor"], 1, "RFDETR_STATE_DIR"),
    "S3 without a scheme": (
        variables(**S3, AWS_ENDPOINT_URL="127.0.0.1:9000"),
        ["predict", "s3://bucket/new", "--out", "found"],
        1,
        "starts with http:// or https://",
    ),
    "unknown tracking server": (variables(MLFLOW_TRACKING_URI="foo://x"), ["history"], 1, "MLflow"),
    "tracking address": (
        variables(MLFLOW_TRACKING_URI="http://[::1"),
        ["history"],
        1,
        "MLFLOW_TRACKING_URI is",
    ),
    "proxy": (variables(http_proxy="http://127.0.0.1:9"), ["history"], 0, "promote"),
    "dataset in the project": (
        lambda _: {},
        ["retrain", "--set", "dataset.dir=models/trained"],
        1,
        "a folder of its own",
    ),
}
SLOW_FAULTS: dict[str, tuple[Callable[[Path], Environ], list[str], int, str]] = {
    "locked database": (locked_database, ["history"], 1, "in use by another process"),
    "no tracking server": (
        variables(MLFLOW_TRACKING_URI="http://127.0.0.1:9"),
        ["history"],
        1,
        "MLflow",
    ),
    "wrong Prefect settings": (
        variables(PREFECT_API_URL="http://[::1/api"),
        ["promote", "1", "--reason", "x"],
        1,
        "Prefect's settings are not valid",
    ),
    "no Prefect server": (
        variables(PREFECT_API_URL="http://127.0.0.1:9/api"),
        ["promote", "1", "--reason", "x"],
        1,
        "Prefect server is unreachable",
    ),
}
# The others are in the slow test: each default test costs a copy of the project and a command.
DEFAULT = (
    "conflict in dvc.lock",
    "database of zeros",
    "a folder for a file",
    "no git",
    "odd pictures",
    "state is a file",
    "S3 without a scheme",
    "dataset in the project",
)
READING = [["plan"], ["history"], ["sync"], PREDICT, ["drift", "data/demo/valid"], ["doctor"]]
WRITING = [
    ["retrain"], ["validate"], ["evaluate"], ["register"], ["promote", "1", "--reason", "x"],
    ["rollback", "--reason", "x"], ["doctor", "--repair"],
]  # fmt: skip
FLOWS = (["retrain"], ["drift", "data/demo/valid"])  # with the Prefect settings of a process


class Faulty:
    """Copies of the retrained project with one fault."""

    def __init__(
        self,
        retrained: Retrained,
        folder: Path,
        fault: Callable[[Path], Environ],
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        self.retrained, self.folder, self.fault = retrained, folder, fault
        self.monkeypatch, self.capfd = monkeypatch, capfd
        self.number = 0

    def renew(self) -> None:
        """A new copy, with the fault."""
        while LOCKS:
            LOCKS.pop().close()
        shutil.rmtree(self.folder / str(self.number), ignore_errors=True)
        self.number += 1
        self.project = self.retrained.copy(self.folder / str(self.number))
        self.changed = self.fault(self.project.root)

    def answer(self, command: list[str]) -> tuple[int, str]:
        """Status and output of a command, in this process where that makes no difference."""
        given = {**self.project.environment(), **self.changed}
        if command in FLOWS or "PREFECT_API_URL" in self.changed:
            done = subprocess.run(
                [sys.executable, "-m", "flows.cli.main", *command],
                cwd=self.project.root,
                env={key: value for key, value in given.items() if value is not None},
                capture_output=True,
                text=True,
                timeout=300,
            )
            return done.returncode, done.stdout + done.stderr
        with self.monkeypatch.context() as patch:
            patch.chdir(self.project.root)
            for key, value in given.items():
                patch.delenv(key, raising=False) if value is None else patch.setenv(key, value)
            self.capfd.readouterr()
            status = main(command)
        captured = self.capfd.readouterr()
        return status, captured.out + captured.err


@pytest.fixture(autouse=True)
def unlocked() -> Iterator[None]:
    yield
    while LOCKS:
        LOCKS.pop().close()


@pytest.mark.parametrize("name", DEFAULT)
def test_a_fault_is_one_text(
    retrained: Retrained,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fault, command, status, words = FAULTS[name]
    faulty = Faulty(retrained, tmp_path, fault, monkeypatch, capfd)
    faulty.renew()
    found, text = faulty.answer(command)
    assert "Traceback" not in text and REPORT not in text, text
    assert (found, words in text) == (status, True), text


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAULTS, *SLOW_FAULTS])
def test_no_command_answers_a_fault_with_a_traceback(
    retrained: Retrained,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    fault, own, status, words = (FAULTS | SLOW_FAULTS)[name]
    faulty = Faulty(retrained, tmp_path, fault, monkeypatch, capfd)
    wrong = []
    faulty.renew()
    for number, command in enumerate([*READING, own, *WRITING]):
        if number >= len(READING):  # what was written or repaired before must not count
            faulty.renew()
        found, text = faulty.answer(command)
        bad = "Traceback" in text or REPORT in text or found not in (0, 1, 3)
        if bad or (command is own and (found, words in text) != (status, True)):
            wrong.append(f"{' '.join(command)} -> {found}: {text[-2000:]}")
    assert not wrong, "\n\n".join(wrong)


def test_a_bug_of_this_project_asks_for_a_report() -> None:
    try:
        {}["x"]
    except KeyError as error:
        text = explain(error)
    assert "Traceback" in text and text.endswith(REPORT)


def test_errors_of_the_machine_name_the_file_and_the_way(tmp_path: Path) -> None:
    cases: list[tuple[Exception, str]] = [
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied. Give this"),
        (OSError(30, "Read-only file system", "/a"), "/a: Read-only file system. Give this user"),
        (FileExistsError(17, "File exists", "/a"), "/a: File exists. Check that path"),
        (MlflowException("failed:\n[Errno 28] No space left on device: '/x'"), "set TMPDIR or"),
        (MemoryError(), "not enough memory (RAM). Set a smaller fit.batch_size"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "x is missing. Run `make setup` or"),
        (ConnectionRefusedError("refused"), "the connection to a server failed: refused"),
    ]
    for error, text in cases:
        assert text in explain(error)
        wrapped = RuntimeError("wrapped")
        wrapped.__cause__ = error
        assert text in explain(wrapped)
    store, other = (sqlite3.connect(tmp_path / "a.db", timeout=0) for _ in range(2))
    with closing(store), closing(other), pytest.raises(sqlite3.OperationalError) as caught:
        store.execute("BEGIN EXCLUSIVE")
        other.execute("CREATE TABLE a (b)")
    assert "in use by another process" in explain(caught.value)
    assert os.linesep not in explain(caught.value)
