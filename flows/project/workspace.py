"""A folder in which one run of the pipeline works: clone, overrides, DVC settings, data."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from ruamel.yaml import YAML

from flows.config.params import PARAMS_FILE, Environment, SourceSettings, load_params, parse_params
from flows.core.digest import digest_of
from flows.core.process import CommandFailed, run_streaming
from flows.core.redact import redact
from flows.storage.s3 import list_versions
from rfdetr.errors import ConfigError, DatasetError
from rfdetr.files import atomic_path, write_text_atomic

REMOTE = "store"
LISTING = "listing-"  # a source's version that `pin_source` wrote begins so
LINK_TYPES = "reflink,hardlink,symlink,copy"
Line = Callable[[str], None]


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


def git(root: Path, *args: str, on_line: Line, **limits: Any) -> list[str]:
    """Run one git command in `root` as a child process."""
    return run_streaming(["git", *args], on_line, cwd=root, **limits)


def checkout(root: Path, ref: str, on_line: Line) -> None:
    """Move the clone in `root` to a commit, tag or branch of its origin.

    Raises ConfigError for a name that the origin does not know.
    """
    try:
        try:
            git(root, "fetch", "--quiet", "origin", ref, on_line=on_line)
            wanted = "FETCH_HEAD"
        except CommandFailed:  # servers give branches and tags by name; a commit needs the history
            shallow = (root / ".git" / "shallow").exists()
            unshallow = ["--unshallow"] if shallow else []
            everything = "+refs/heads/*:refs/remotes/origin/*"
            git(root, "fetch", "--quiet", *unshallow, "origin", everything, on_line=on_line)
            wanted = ref
        git(root, "checkout", "--quiet", "--detach", wanted, on_line=on_line)
    except CommandFailed as error:
        raise ConfigError(f"ref '{ref}' is no commit, tag or branch of the origin.") from error


def write_overrides(root: Path, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Write a run's changes into params.yaml of `root`; comments and order stay.

    The result is checked first: one ConfigError lists every mistake, and nothing is written.
    """
    if not changes:
        return
    file = root / PARAMS_FILE
    editor = YAML()
    editor.preserve_quotes = True
    editor.width = 1 << 16  # lines stay whole
    with open(file, encoding="utf-8") as stream:
        data = editor.load(stream) or {}
    for section, fields in changes.items():
        if data.get(section) is None:
            data[section] = {}
        data[section].update(fields)
    with atomic_path(file) as temporary:
        with open(temporary, "w", encoding="utf-8") as stream:
            editor.dump(data, stream)
        parse_params(yaml.safe_load(temporary.read_text(encoding="utf-8")), origin=str(file))


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


def prepare_workspace(
    root: Path, changes: Mapping[str, Mapping[str, Any]], env: Environment, on_line: Line
) -> None:
    """Make `root` ready: overrides, the version on S3, DVC settings, and what the remote has.

    Raises DatasetError when the dataset is neither there, nor pulled, nor the product of a stage.
    """
    write_overrides(root, changes)
    pin_source(root)
    configure_dvc(root, env)
    if has_remote(root):
        dvc(root, "pull", "--allow-missing", on_line=on_line)
    require_dataset(root, on_line)


def require_dataset(root: Path, on_line: Line) -> None:
    """Raise DatasetError unless the dataset is there, in DVC's cache, or the product of a stage."""
    folder = load_params(root / PARAMS_FILE).dataset.dir
    if not (root / folder).exists() and data_stage(root) is None:
        pointer = root / f"{folder}.dvc"
        if pointer.exists():
            with contextlib.suppress(CommandFailed):
                dvc(root, "checkout", f"{folder}.dvc", on_line=on_line)
                return
        found = (
            f"{pointer} exists but its data is not on the DVC remote"
            if pointer.exists()
            else (f"there is no {pointer} and no stage that makes it")
        )
        raise DatasetError(
            f"The dataset {folder} is missing: {found}. Copy it there and run `dvc add {folder}`, "
            "or name its s3:// address under `sources` in params.yaml."
        )


def pin_source(root: Path) -> None:
    """Write what S3 holds now as the version of the dataset's source into params.yaml.

    The version is a DVC parameter: the stage `fetch` runs again when it is another one. Without a
    source, or with a version that a person wrote, nothing happens. Raises StorageError.
    """
    found = used_source(root)
    if found is None:
        return
    name, source = found
    version = current_version(source)
    if version != source.version:
        changed = {**source.model_dump(exclude_none=True), "version": version}
        write_overrides(root, {"sources": {name: changed}})


def used_source(root: Path) -> tuple[str, SourceSettings] | None:
    """Name and settings of the S3 source that the dataset is fetched from, if it is."""
    stage, _, name = (data_stage(root) or "").partition("@")
    if stage != "fetch":
        return None
    return name, load_params(root / PARAMS_FILE).sources[name]


def current_version(source: SourceSettings) -> str:
    """A name of what the address holds now; a version that a person wrote stands.

    Raises StorageError.
    """
    if source.version is not None and not source.version.startswith(LISTING):
        return source.version
    return LISTING + digest_of(list_versions(source.uri))[:32]


def data_stage(root: Path) -> str | None:
    """The DVC stage that makes `dataset.dir` (`demo`, `fetch@<name>`), or None for a user's own."""
    params = load_params(root / PARAMS_FILE)
    folder = os.path.normpath(params.dataset.dir)
    makers = {os.path.normpath("data/demo"): "demo"}
    makers |= {os.path.normpath(f"data/{name}"): f"fetch@{name}" for name in params.sources}
    return makers.get(folder)


def stage_names(root: Path) -> Sequence[str]:
    """The stages of a run in their order: the one that makes the data, then those of dvc.yaml."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    first = data_stage(root)
    return [*([first] if first else []), *(n for n in stages if n not in ("demo", "fetch"))]
