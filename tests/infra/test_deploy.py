"""What `make deploy` sets up on a server, and the slots that a run then takes."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=ROOT, check=True
    )


def test_slots_of_the_gpu_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.config.sections import RuntimeSettings
    from flows.orchestration import gpus
    from infra.deploy import gpu_slots

    assert gpu_slots(None, None, "auto") == 1
    assert gpu_slots(None, None, 2) == 2
    assert gpu_slots(4, 1, "auto") == gpu_slots(None, 4, 2) == gpu_slots(4, None, 2) == 4
    assert gpu_slots(None, 0, "auto") == 0, "a team's pause stays"

    monkeypatch.setattr(gpus, "_uuids", lambda: ["GPU-a", "GPU-b", "GPU-c", "GPU-d"])
    for visible, count in {
        "": 0,
        "0,1": 2,
        "2": 1,
        "0,-1,1": 1,
        "0,9": 1,
        "GPU-a,GPU-b": 2,
    }.items():
        assert gpus.visible_gpus({"CUDA_VISIBLE_DEVICES": visible}) == count, visible
    assert gpus.visible_gpus({}) == 4
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.wanted_slots(RuntimeSettings()) == 4
    assert gpus.wanted_slots(RuntimeSettings(devices=2)) == 2
    assert gpus.wanted_slots(RuntimeSettings(accelerator="cpu")) == 1
    monkeypatch.setattr(gpus, "_uuids", list)
    assert gpus.wanted_slots(RuntimeSettings()) == 1


def test_a_run_asks_for_no_more_slots_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.orchestration import limits

    asked = []

    def concurrency(name: str, occupy: int, **_: object) -> contextlib.AbstractContextManager[None]:
        asked.append(occupy)
        return contextlib.nullcontext()

    monkeypatch.setattr("prefect.concurrency.sync.concurrency", concurrency)
    monkeypatch.setattr(limits, "_ensure_limit", lambda *_: 2)
    monkeypatch.setattr(limits, "_warn_when_slow", lambda *_: contextlib.nullcontext())
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        for wanted in (1, 4):
            with limits.slot("gpu", wanted, Path()):
                pass
    assert asked == [1, 2]


def test_the_environment_of_the_stack_finds_the_commands(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "infra.stack", "--folder", tmp_path / "stack", "env")
    assert done.stdout.splitlines()[-1] == f'export PATH={BIN}:"$PATH"'


def test_a_kubernetes_pool_gets_our_job_template() -> None:
    from infra.deploy import base_job_template

    assert base_job_template("process") == {}
    assert "job_manifest" in base_job_template("kubernetes")["job_configuration"]


@pytest.mark.parametrize(
    ("words", "given"),
    [((), ""), (("GPUS=4", "POOL_TYPE=kubernetes"), "--gpus 4 --pool-type kubernetes")],
)
def test_make_deploy_hands_its_settings_on(words: tuple[str, ...], given: str) -> None:
    done = run("make", "--no-print-directory", "--dry-run", "deploy", *words)
    assert (
        f"-m infra.deploy {given}".strip() == done.stdout.splitlines()[-1].partition(" ")[2].strip()
    )


def test_deployment_names_the_variables_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    from infra import deploy

    text = deploy.PROJECT_FILE.read_text()
    names = deploy.required_variables(text)
    assert names == ["RFDETR_GIT_BRANCH", "RFDETR_GIT_URL", "RFDETR_WORK_POOL"]
    for name in (*names, "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(deploy.DeployError, match=r"RFDETR_GIT_URL.*PREFECT_API_URL"):
        deploy.check_environment(text)


def test_automations_bind_to_the_deployments() -> None:
    from prefect.automations import AutomationCore

    from infra import deploy

    resume = "{{ id of rfdetr resume after a crash }}"
    lost = "{{ id of rfdetr resume of a lost run }}"
    manual = "{{ id of retrain/manual }}"
    values = {"{{ deployments }}": ["prefect.deployment.a"], resume: str(uuid.UUID(int=3))}
    values |= {manual: str(uuid.UUID(int=4)), lost: str(uuid.UUID(int=5))}
    entries = yaml.safe_load(deploy.AUTOMATIONS.read_text())["automations"]
    built = [AutomationCore.model_validate(deploy.fill(e, values)) for e in entries]
    assert [a.trigger.posture.value for a in built] == 2 * ["Proactive"] + 3 * ["Reactive"]
    assert "{{" not in json.dumps([a.trigger.model_dump(mode="json") for a in built])
    for again in (built[1].actions[0], built[2].actions[0]):
        assert again.source == "inferred", "the deployment that crashed is restarted"
        assert "flow_run.parameters" in again.parameters["params"]
    assert [a.automation_id for a in built[3].actions] == [uuid.UUID(int=3), uuid.UUID(int=5)]
    assert built[4].actions[0].deployment_id == uuid.UUID(int=4)


def test_the_parameters_of_a_restart_render_as_the_server_renders_them() -> None:
    from prefect.server.events.actions import RunDeployment
    from prefect.utilities.schema_tools.hydration import HydrationContext, hydrate

    from infra import deploy

    crashed = SimpleNamespace(id=uuid.uuid4(), parameters={"params": {"publish": True}})
    context = HydrationContext(render_jinja=True, jinja_context={"flow_run": crashed})
    entries = yaml.safe_load(deploy.AUTOMATIONS.read_text())["automations"]
    actions = [a for e in entries for a in e["actions"] if a.get("source") == "inferred"]
    assert len(actions) == 2
    for action in actions:
        parameters = RunDeployment.model_validate(action).parameters
        RunDeployment._upgrade_v1_templates(parameters)  # in place, as before each rendering
        assert hydrate(parameters, context) == {
            "params": {"publish": True},
            "resumes": str(crashed.id),
        }


def test_every_final_state_of_a_flow_ends_the_wait_for_its_heartbeat() -> None:
    """One that is missing would mark a finished run as lost, and start it again."""
    from infra import deploy

    entries = yaml.safe_load(deploy.AUTOMATIONS.read_text())["automations"]
    watching = [e["trigger"] for e in entries if e["trigger"]["posture"] == "Proactive"]
    source = (ROOT / "flows/retrain.py").read_text()
    named = re.findall(r'return Completed\(name="(\w+)"', source.partition("\n@task")[0])
    assert set(named) == {"Skipped"}
    final = {"Completed", "Failed", "TimedOut", "Cancelled", "Crashed", *named}
    for trigger in watching:
        assert {f"prefect.flow-run.{name}" for name in final} <= set(trigger["expect"])
