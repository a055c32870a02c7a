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
from rfdetr.errors import ConfigError
from rfdetr.files import write_text_atomic

REMOTE = "store"


LINK_TYPES = "reflink,hardlink,symlink,copy"


def dvc(
    root: Path,
    *args: str,
    on_line: Line,
    variables: Mapping[str, str] | None = None,
    **limits: Any,
) -> list[str]:
    """Run one DVC command in `root` as a child process; the last lines of its output.

    `variables` are added to the environment of the command and of the stages that it runs.
    """
    beside = str(Path(sys.executable).parent)  # stages say `python`; it must be this one
    path = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
    env = {**os.environ, **(variables or {}), "PATH": path}
    command = [sys.executable, "-m", "dvc", *args]
    return run_streaming(command, on_line, cwd=root, env=env, **limits)


def forget_dead_locks(root: Path) -> None:
    """Take killed DVC processes out of DVC's list of who reads and writes what.

    DVC does so only when no process has their number; a zombie has it, and a later process may.
    A list that was cut off while it was written is removed.
    """
    file = root / ".dvc" / "tmp" / "rwlock"
    if not file.exists() or not _dead_held(file):
        return
    from dvc.lock import make_lock

    guard = file.with_name("rwlock.lock")
    with make_lock(str(guard), tmp_dir=str(file.parent)):
        write_text_atomic(file, json.dumps(_living(file)))


def _dead_held(file: Path) -> bool:
    try:
        return bool(_living(file) != json.loads(file.read_text()))
    except ValueError:
        return True


def _living(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text())
    except ValueError:
        held = {}
    read = {path: [i for i in infos if _is_dvc(i)] for path, infos in held.get("read", {}).items()}
    write = {path: info for path, info in held.get("write", {}).items() if _is_dvc(info)}
    return {"write": write, "read": {path: infos for path, infos in read.items() if infos}}


def _is_dvc(info: Mapping[str, Any]) -> bool:
    try:
        process = psutil.Process(info["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and "dvc" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def configure_dvc(root: Path, env: Environment) -> None:
    """Write .dvc/config.local: without git or with it, shared cache, remote of the environment.

    Keys are not written: DVC reads them from the environment too. Raises ConfigError.
    """
    from dvc.config import Config
    from dvc.config import ConfigError as DvcConfigError

    try:
        with Config(str(root / ".dvc"), validate=False).edit("local") as local:
            if not _has_git(root):
                local["core"]["no_scm"] = True
            if env.dvc_cache is not None:
                folder = str(env.dvc_cache.expanduser().absolute())
                local["cache"].update(dir=folder, type=LINK_TYPES)
            if env.dvc_remote:
                local["core"]["remote"] = REMOTE
                remote = local["remote"].setdefault(REMOTE, {})
                remote["url"] = env.dvc_remote
                if env.s3_endpoint and env.dvc_remote.startswith("s3://"):
                    remote["endpointurl"] = env.s3_endpoint
    except DvcConfigError as error:
        raise ConfigError(f"{root / '.dvc'}: {redact(str(error))}") from error


def _has_git(root: Path) -> bool:
    return any((folder / ".git").exists() for folder in (root, *root.parents))


def has_remote(root: Path) -> bool:
    """Whether DVC of `root` has a default remote."""
    from dvc.config import Config

    return "remote" in Config(str(root / ".dvc"))["core"]
