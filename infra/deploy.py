"""Deploys to a Prefect server: work pool, concurrency limits, deployments and automations.

    python -m infra.deploy [--gpus N] [--pool-type process|kubernetes]

Requires PREFECT_API_URL and every variable that prefect.yaml uses. Running it again is safe: it
updates what exists, and keeps a GPU limit that was set by hand unless --gpus is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

ROOT = Path(__file__).parent.parent
PROJECT_FILE = ROOT / "prefect.yaml"
AUTOMATIONS = Path(__file__).parent / "prefect" / "automations.yaml"
JOB_TEMPLATE = Path(__file__).parent / "kubernetes" / "prefect-job-template.json"


class DeployError(RuntimeError):
    """The environment is incomplete; the message lists everything that is missing."""


def required_variables(text: str) -> list[str]:
    """Names of the environment variables used in a prefect.yaml."""
    return sorted(set(re.findall(r"\{\{\s*\$(\w+)\s*\}\}", text)))


def check_environment(text: str) -> None:
    """Raise DeployError if a variable is unset; Prefect would deploy the literal placeholder."""
    missing = [n for n in required_variables(text) if not os.environ.get(n)]
    if not os.environ.get("PREFECT_API_URL"):
        missing.append("PREFECT_API_URL")
    if missing:
        raise DeployError(f"set {', '.join(missing)} in the environment and retry")


def prepare_server(client: SyncPrefectClient, pool: str, pool_type: str, gpus: int | None) -> None:
    """Create the work pool if missing, and set the concurrency limits of params.yaml."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound

    from flows.config.params import load_params

    params = load_params(ROOT / "params.yaml")
    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        client.create_work_pool(
            WorkPoolCreate(
                name=pool, type=pool_type, base_job_template=base_job_template(pool_type)
            )
        )
    slot = params.runtime.gpu_slot
    try:
        known = client.read_global_concurrency_limit_by_name(slot).limit
    except ObjectNotFound:
        known = None
    slots = gpu_slots(gpus, known, params.runtime.devices)
    if slots != known:
        client.upsert_global_concurrency_limit_by_name(slot, slots)
    client.upsert_global_concurrency_limit_by_name(f"registry-{params.registry.name}", 1)


def base_job_template(pool_type: str) -> dict[str, Any]:
    """The job template of a new pool; empty means Prefect's default."""
    return dict(json.loads(JOB_TEMPLATE.read_text())) if pool_type == "kubernetes" else {}


def gpu_slots(given: int | None, known: int | None, devices: int | str) -> int:
    """Slots of the GPU limit: as given, else as they are, and enough for one flow run."""
    slots = next((number for number in (given, known) if number is not None), 1)
    return max(slots, devices) if isinstance(devices, int) else slots


def apply_deployments() -> list[str]:
    """Run `prefect deploy --all`; returns the deployments of prefect.yaml as flow/name."""
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"], cwd=ROOT, check=True
    )
    project = yaml.safe_load(PROJECT_FILE.read_text())
    return [
        f"{entry['entrypoint'].rpartition(':')[2].replace('_', '-')}/{entry['name']}"
        for entry in project["deployments"]
    ]


def install_automations(client: SyncPrefectClient, names: list[str]) -> list[str]:
    """Install the automations of automations.yaml with the ids of the deployments filled in."""
    from prefect.automations import AutomationCore

    ids = {name: client.read_deployment_by_name(name).id for name in names}
    resumable = [
        f"prefect.deployment.{i}" for name, i in ids.items() if name.startswith("retrain/")
    ]
    values: dict[str, Any] = {f"{{{{ id of {name} }}}}": str(i) for name, i in ids.items()}
    values["{{ deployments }}"] = resumable
    installed = []
    for entry in yaml.safe_load(AUTOMATIONS.read_text())["automations"]:
        automation = AutomationCore.model_validate(fill(entry, values))
        for old in client.read_automations_by_name(automation.name):
            client.delete_automation(old.id)
        values[f"{{{{ id of {automation.name} }}}}"] = str(client.create_automation(automation))
        installed.append(automation.name)
    return installed


def fill(value: Any, values: dict[str, Any]) -> Any:
    """Replace every string in nested plain data that equals a key of `values`."""
    if isinstance(value, dict):
        return {key: fill(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, values) for item in value]
    return values.get(value, value) if isinstance(value, str) else value


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m infra.deploy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gpus", type=int, help="slots of the GPU limit (default: keep, or 1)")
    parser.add_argument("--pool-type", default="process", help="type of a new work pool")
    options = parser.parse_args(arguments)
    try:
        check_environment(PROJECT_FILE.read_text())
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            pool = os.environ["RFDETR_WORK_POOL"]
            prepare_server(client, pool, options.pool_type, options.gpus)
            names = apply_deployments()
            automations = install_automations(client, names)
    except (DeployError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("deployed: " + ", ".join(names))
    print("automations: " + ", ".join(automations))
    return 0


if __name__ == "__main__":
    sys.exit(main())
