"""DVC as a child process, its settings, and its stale locks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from flows.config.environment import Environment
from flows.core.process import Line, run_streaming
from flows.core.redact import redact
from flows.core.stopping import note_progress
from rfdetr.errors import ConfigError
from rfdetr.files import write_text_atomic

REMOTE = "store"
EXTRA_GRACE_S = 10.0  # for a stage, after its trainers have ended within runtime.grace_s
LINK_TYPES = "reflink,hardlink,symlink,copy"


def dvc(
    root: Path,
    *args: str,
    on_line: Line,
    variables: Mapping[str, str] | None = None,
    **limits: Any,
) -> list[str]:
    """Run one DVC command in `root` as a child process and return the last lines of its output.

    `variables` are added to the environment of the command and of the stages that it runs.
    """

    def heard(line: str) -> None:
        note_progress(line)
        on_line(line)

    beside = str(Path(sys.executable).parent)  # stages call `python`: this one
    path = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, **(variables or {}), "PATH": path}
    command = [sys.executable, "-m", "dvc", *args]
    return run_streaming(command, heard, cwd=root, env=env, **limits)


def forget_dead_locks(root: Path) -> None:
    """Remove killed DVC processes from DVC's list of readers and writers (.dvc/tmp/rwlock).

    DVC does so only if no process has their pid, but a zombie has it, and a later process may.
    A list that was truncated while it was written is emptied.
    """
    file = root / ".dvc" / "tmp" / "rwlock"
    if not file.exists() or not _is_stale(file):
        return
    from dvc.lock import make_lock

    guard = file.with_name("rwlock.lock")
    with make_lock(str(guard), tmp_dir=str(file.parent)):
        write_text_atomic(file, json.dumps(_living(file)))


def _is_stale(file: Path) -> bool:
    try:
        return bool(_living(file) != json.loads(file.read_text()))
    except ValueError:
        return True


def _living(file: Path) -> dict[str, Any]:
    """The list without dead processes; empty if it is damaged."""
    try:
        held = json.loads(file.read_text())
        read = {
            path: [i for i in infos if _is_dvc(i)] for path, infos in held.get("read", {}).items()
        }
        write = {path: info for path, info in held.get("write", {}).items() if _is_dvc(info)}
    except (ValueError, TypeError, AttributeError, KeyError):
        read, write = {}, {}
    return {"write": write, "read": {path: infos for path, infos in read.items() if infos}}


def _is_dvc(info: Mapping[str, Any]) -> bool:
    try:
        process = psutil.Process(info["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and "dvc" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def configure_dvc(root: Path, env: Environment) -> None:
    """Write the machine's settings into .dvc/config.local: no git, shared cache, remote.

    Credentials are not written: DVC reads them from the environment. Raises ConfigError.
    """
    from dvc.config import Config
    from dvc.config import ConfigError as DvcConfigError

    try:
        with Config(str(root / ".dvc"), validate=False).edit("local") as local:
            if not _has_git(root):
                local["core"]["no_scm"] = True
            else:  # git may have come later
                local["core"].pop("no_scm", None)
            if env.dvc_cache is not None:
                folder = str(env.dvc_cache.expanduser().absolute())
                local["cache"].update(dir=folder, type=LINK_TYPES)
            if env.dvc_remote:
                local["core"]["remote"] = REMOTE
                remote = local["remote"].setdefault(REMOTE, {})
                remote["url"] = env.dvc_remote
                remote.pop("endpointurl", None)
                if env.s3_endpoint and env.dvc_remote.startswith("s3://"):
                    remote["endpointurl"] = env.s3_endpoint
            elif local["core"].get("remote") == REMOTE:  # of an earlier run
                del local["core"]["remote"], local["remote"][REMOTE]
    except DvcConfigError as error:
        raise ConfigError(f"{root / '.dvc'}: {redact(str(error))}") from error


def knows_git(root: Path) -> bool:
    """Whether DVC's local settings exist, and say correctly whether the project is in git."""
    local = root / ".dvc" / "config.local"
    try:
        return local.is_file() and ("no_scm" in local.read_text("utf-8")) != _has_git(root)
    except UnicodeDecodeError:  # `configure_dvc` names the file
        return False


def _has_git(root: Path) -> bool:
    return any((folder / ".git").exists() for folder in (root, *root.parents))


def has_remote(root: Path) -> bool:
    """Whether the DVC project `root` has a default remote."""
    from dvc.config import Config

    return "remote" in Config(str(root / ".dvc"))["core"]
