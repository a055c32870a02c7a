"""What `doctor` checks about machine and project: files, folders, disk, git, addresses."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flows.core.files import read_yaml
from flows.project.project import Project
from flows.project.workspace import stage_names
from rfdetr.files import dead_folders

FREE_BYTES = 512 << 20
FILES = ("params.yaml", "dvc.yaml", "dvc.lock", ".dvc/config", "mlflow.db")
FOLDERS = (".dvc", "data", "models", "reports", "metrics", "plots", "mlartifacts")
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


def machine_problems(project: Project) -> Iterator[str]:
    """One text for each thing of this machine that a run would fail on."""
    for folder, change in (
        (project.root, "use a checkout of your own"),
        (project.env.state_dir, "set RFDETR_STATE_DIR to another folder"),
        (Path(tempfile.gettempdir()), "set TMPDIR to another folder"),
    ):
        yield from _folder_problems(folder, change)
    yield from _git_problems(project.root)
    for name in ENDPOINTS:
        address = os.environ.get(name)
        if address and not address.startswith(("http://", "https://")):
            yield f"{name} must start with http:// or https://"


def project_problems(project: Project) -> Iterator[str]:
    """One text for each file of the project that no command can use."""
    for name in (*FILES, *FOLDERS):
        path = project.root / name
        if path.exists() and path.is_dir() != (name in FOLDERS):
            kind = "folder" if name in FOLDERS else "file"
            yield f"{path} is not a {kind}; move it away, then restore it from git or run again"
    try:
        str(project.root).encode()
    except UnicodeEncodeError:
        name = ascii(str(project.root))
        yield f"{name} has bytes that are not text here; set LANG=C.UTF-8, or rename it"
    stage_names(project)
    lock = read_yaml(project.lock_file) if project.lock_file.is_file() else {"stages": {}}
    if not isinstance(lock, dict) or not isinstance(lock.get("stages"), dict):
        yield f"{project.lock_file} is damaged; restore it with `git checkout`, or remove it"


def machine_notes(project: Project) -> Iterator[str]:
    """What is unusual, but works."""
    for folder in dead_folders(project.root / "data"):
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) >> 20
        yield (
            f"{folder} ({size} MiB) was left by a killed import; the next `rfdetr-pipeline init` "
            "removes it, or remove it yourself"
        )
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        yield (
            f"no resolver knows this machine's name, {socket.gethostname()}: trainings on several "
            "nodes need runtime.rendezvous with an address"
        )


def _folder_problems(folder: Path, change: str) -> Iterator[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".rfdetr-"):
            pass
    except OSError as error:
        yield f"{folder} cannot be written ({error.strerror}); {change}"
        return
    free = shutil.disk_usage(folder).free
    if free < FREE_BYTES:
        yield f"{folder} has only {free >> 20} MiB free; free some space, or {change}"


def _git_problems(root: Path) -> Iterator[str]:
    """A checkout of another user, whose commit would be missing from every record."""
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        return
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--git-dir"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        yield "git does not work, so records would not name the commit; install it"
        return
    if done.returncode and "dubious ownership" in done.stderr:
        yield (
            f"git refuses {root}, which belongs to another user, so records would not name the "
            f"commit; run `git config --global --add safe.directory {root}`"
        )
    elif done.returncode:
        yield f"git refuses {root}: {done.stderr.strip()}"
