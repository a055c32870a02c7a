"""A local stack with a tiny project deployed on it: git repository, data on S3, worker."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from infra.services import postgres_folder
from tests.flows.projects import ROOT, make_project
from tests.services.live import LiveStack

BRANCH = "main"


def make_repository(root: Path) -> Path:
    """The project as a git repository, with a tiny model.

    Its schedules wait for a test, and lost flow runs are noticed sooner.
    """
    make_project(
        root,
        dataset={"name": "tiny", "dir": "data/tiny"},
        gate={"floor": 0.0, "min_images": 1},
        registry={"name": "service-test"},
    )
    shutil.copytree(ROOT / "infra", root / "infra", ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "prefect.yaml").read_text()
    text = text.replace('cron: "30 * * * *"', 'cron: "* * * * *"')
    (root / "prefect.yaml").write_text(text.replace("active: true", "active: false"))
    automations = root / "infra/prefect/automations.yaml"
    automations.write_text(automations.read_text().replace("within: 90", "within: 75"))
    git(root, "init", "--quiet", f"--initial-branch={BRANCH}")
    git(root, "config", "user.email", "test@localhost")
    git(root, "config", "user.name", "test")
    return root


def git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout


def add_dataset(stack: LiveStack) -> None:
    """Version a dataset with DVC, push it to S3, and leave nothing but its pointer."""
    stack.module("flows.stages.demo")
    (stack.project / "data/demo").rename(stack.project / "data/tiny")
    remote = stack.environment["RFDETR_DVC_REMOTE"]
    stack.module("dvc", "remote", "add", "--local", "--default", "store", remote)
    endpoint = stack.environment["AWS_ENDPOINT_URL"]
    stack.module("dvc", "remote", "modify", "--local", "store", "endpointurl", endpoint)
    stack.module("dvc", "add", "data/tiny")
    stack.module("dvc", "push")
    shutil.rmtree(stack.project / "data/tiny")
    shutil.rmtree(stack.project / ".dvc/cache")
    git(stack.project, "add", ".")
    git(stack.project, "commit", "--quiet", "-m", "A tiny dataset")


def start(stack: LiveStack) -> None:
    """`make stack` in the stack's folder."""
    command = [sys.executable, "-m", "infra.stack", "--folder", str(stack.folder)]
    log = stack.folder.with_suffix(".log")
    with open(log, "w") as stream:  # a pipe would be held open by the background process
        done = subprocess.run(
            [*command, "up", "--detach"], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT
        )
    assert done.returncode == 0, log.read_text()


def bring_up(folder: Path) -> LiveStack:
    """Stack, repository, dataset, deployments."""
    stack = LiveStack(folder / "stack", make_repository(folder / "project"))
    start(stack)
    add_dataset(stack)
    stack.module("infra.deploy")
    return stack


def stop(stack: LiveStack) -> None:
    """`make stack-stop`."""
    stack.module("infra.stack", "--folder", str(stack.folder), "down")


def take_down(stack: LiveStack) -> None:
    """Stop the stack and remove the database that lies outside its folder."""
    stop(stack)
    data, _ = postgres_folder(stack.folder)
    shutil.rmtree(data.parent if data.parent != stack.folder else data, ignore_errors=True)
