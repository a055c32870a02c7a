"""Promotion and rollback by users and by the flow: serialised, and announced once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flows import retrain
from flows.cli.main import main
from flows.gate.decide import decide
from flows.gate.verdict import GatePolicy, Scores, Verdict
from flows.orchestration.limits import registry_slot
from flows.project.project import Project
from flows.registry.registry import CHAMPION, Registry
from flows.release import steps
from flows.release.champion import ChampionChangedError, history, promote
from flows.release.judgement import record_verdict
from rfdetr.tracking.client import experiment_id
from tests.flows.prefect_fixtures import PrefectServer, Webhook
from tests.flows.projects import ROOT, environment, write_params

NAME = "tiny"


@pytest.fixture
def root(tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without data, whose registry holds three versions; the first one serves."""
    folder = tmp_path / "project"
    folder.mkdir()
    write_params(folder)
    shutil.copy(ROOT / "dvc.yaml", folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    monkeypatch.setenv("RFDETR_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.delenv("RFDETR_NOTIFY_URL", raising=False)
    monkeypatch.chdir(folder)
    registry = Registry(NAME, tracking_uri)
    where = experiment_id(registry.client, "rfdetr/demo", tracking_uri)
    registry.client.create_registered_model(NAME)
    for _ in range(3):
        run_id = registry.client.create_run(where).info.run_id
        registry.client.create_model_version(NAME, "file:///models/x", run_id=run_id)
    promote(registry, 1, reason="first", by="ada")
    return folder


@pytest.fixture
def registry(root: Path, tracking_uri: str) -> Registry:
    return Registry(NAME, tracking_uri)


def judged(number: int, champion: int, values: tuple[float, float] = (0.6, 0.5)) -> Verdict:
    def scores(version: int, value: float) -> Scores:
        return Scores(
            model=f"version {version}", weights_sha256=str(version), dataset_sha256="d",
            settings="s", class_names=("a",), images=100, metrics={"map_50_95": value},
            export_parity=True,
        )  # fmt: skip

    old, new = scores(champion, values[1]), scores(number, values[0])
    return decide(old, new, GatePolicy(evidence="point"), champion)


def test_every_manual_move_is_announced_once(
    registry: Registry, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RFDETR_NOTIFY_URL", webhook.url)
    record_verdict(registry, 2, judged(2, champion=1))
    before = len(webhook.posts)
    assert main(["promote", "2", "--reason", "looks better"]) == 0
    assert main(["promote", "2", "--reason", "looks better"]) == 0
    assert main(["rollback", "--reason", "misses small parts"]) == 0
    said = [(post["subject"], post["text"]) for post in webhook.posts[before:]]
    assert said == [
        ("champion changed", "version 2: looks better"),
        ("champion rolled back", "version 1 is champion again: misses small parts"),
    ]


def test_a_version_without_a_verdict_needs_force(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["promote", "2", "--reason", "a feeling"]) == 1
    assert "version 2 was not judged by the gate" in capsys.readouterr().err
    assert main(["promote", "2", "--reason", "a feeling", "--force"]) == 0
    assert registry.aliases()["champion"] == 2


def test_approving_a_verdict_about_another_champion_needs_force(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    record_verdict(registry, 2, judged(2, champion=1))
    promote(registry, 3, reason="in between", by="ada")
    assert main(["promote", "2", "--reason", "approved"]) == 1
    assert "champion is version 3" in capsys.readouterr().err
    assert main(["promote", "2", "--reason", "approved", "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--reason", "r", "--to", "0"], "no version 0"),
        (["--reason", "r", "--to", "3"], "version 3 never served"),
        (["--reason", ""], "reason is empty"),
        (["--reason", "  "], "reason is empty"),
    ],
)
def test_a_rollback_that_cannot_be_meant_moves_nothing(
    arguments: list[str], problem: str, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(registry, 2, reason="better", by="ada")
    assert main(["rollback", *arguments]) == 1
    assert problem in capsys.readouterr().err
    assert registry.aliases() == {"champion": 2, "previous_champion": 1}


def test_a_promotion_needs_a_reason(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", "2", "--reason", " ", "--force"]) == 1
    assert "reason is empty" in capsys.readouterr().err
    assert registry.aliases() == {"champion": 1}


def test_a_deleted_champion_is_replaced_by_a_named_version(registry: Registry) -> None:
    promote(registry, 2, reason="better", by="ada")
    registry.client.delete_model_version(NAME, "2")
    assert main(["rollback", "--reason", "version 2 was deleted"]) == 1
    assert main(["rollback", "--reason", "version 2 was deleted", "--to", "1"]) == 0
    assert registry.aliases() == {"champion": 1}
    record = history(registry)[-1]
    assert (record.action, record.version, record.previous) == ("rollback", 1, None)


def test_a_rollback_waits_for_a_running_promotion(
    root: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock the promotion would overwrite the rollback that came after its look."""
    started, proceed = threading.Event(), threading.Event()
    real = promote

    def slow(*arguments: Any, **options: Any) -> Any:
        started.set()
        assert proceed.wait(20)
        return real(*arguments, **options)

    monkeypatch.setattr("flows.release.champion.promote", slow)
    verdict = judged(2, champion=1)
    promotion = threading.Thread(target=steps.promote_winner, args=(Project(root), 2, verdict))
    promotion.start()
    assert started.wait(20)
    back = threading.Thread(target=steps.roll_back, args=(Project(root),), kwargs={"reason": "bad"})
    back.start()
    back.join(1)
    assert back.is_alive()
    proceed.set()
    promotion.join(20)
    back.join(20)
    assert registry.aliases()[CHAMPION] == 1
    assert registry.version(2).tags["promotion.rolled_back"] == "true"


@pytest.mark.parametrize("command", ["register", "promote 2", "rollback"])
def test_commands_wait_for_the_registry(
    command: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    for name in ("registration.register", "champion.promote", "champion.rollback"):
        monkeypatch.setattr(f"flows.release.{name}", lambda *_, **__: done.set())
    arguments = [*command.split(), *([] if command == "register" else ["--reason", "r"])]
    with registry_slot(Project(root)):
        thread = threading.Thread(target=main, args=(arguments,))
        thread.start()
        assert not done.wait(1)
    assert done.wait(20)
    thread.join(20)


def test_the_verdict_of_a_second_look_is_the_one_that_is_told(
    root: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(registry, 3, reason="in between", by="ada")
    second = judged(2, champion=3, values=(0.6, 0.7))
    monkeypatch.setattr(retrain, "_judge", lambda *_: second)
    state = retrain.promote.fn(Project(root), 2, judged(2, champion=1), allowed=True)
    assert (state.name, state.message) == ("Kept", f"refuse: {second.reason}")
    assert registry.aliases()[CHAMPION] == 3
    with pytest.raises(ChampionChangedError):
        steps.promote_winner(Project(root), 2, judged(2, champion=1))


HOLD = """
import sys, time
from pathlib import Path
from flows.orchestration.limits import registry_slot
from flows.project.project import Project
with registry_slot(Project(Path(sys.argv[1])), "shared"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    print(time.time(), flush=True)
"""


def test_an_unreachable_server_is_one_readable_error(root: Path, tmp_path: Path) -> None:
    home = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "flows.cli.main", "rollback", "--reason", "r"]
    env = {**environment(root), **home, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1
    assert "slot registry-tiny: the Prefect server is unreachable" in done.stderr
    assert "unset PREFECT_API_URL" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_server_gives_the_slot_to_one_process_at_a_time(
    prefect_server: PrefectServer, tmp_path: Path
) -> None:
    """Outside of any flow, as the command line does, and with state folders of their own."""
    home = {"PREFECT_API_URL": prefect_server.url, "PREFECT_HOME": str(prefect_server.folder)}

    def start(folder: str, seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path), str(seconds)]
        env = {**environment(tmp_path / folder / "project"), **home}
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT)

    with start("one", 4) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with start("two", 0) as second:
            assert second.stdout is not None and second.stdout.readline() == "held\n"
            acquired = time.time()
            assert float(first.stdout.readline()) <= acquired
