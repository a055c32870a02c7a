"""Prepares the project folder for a run of the pipeline: DVC settings, data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from flows.config.sections import SourceSettings
from flows.core.digest import digest_of
from flows.core.process import CommandFailed, Line
from flows.project.dvc import configure_dvc, dvc, has_remote
from flows.project.project import Project
from flows.storage.s3 import list_versions
from rfdetr.errors import ConfigError, DatasetError

STAGES = ("validate", "convert", "fit", "evaluate")  # after the one that writes the data
LISTING = "listing-"  # prefix of a version that `pin_source` wrote


def prepare_workspace(project: Project, on_line: Line) -> None:
    """Pin the version of the data on S3, configure DVC, and pull what the remote has.

    Raises DatasetError if the dataset is neither there, nor pulled, nor the output of a stage.
    """
    pin_source(project)
    configure_dvc(project.root, project.env)
    if has_remote(project.root):
        limit = project.params.runtime.stage_timeout_s
        dvc(project.root, "pull", "--allow-missing", on_line=on_line, timeout=limit)
    require_dataset(project, on_line)


def require_dataset(project: Project, on_line: Line) -> None:
    """Raise DatasetError unless the dataset is there, in DVC's cache, or the output of a stage."""
    folder = project.params.dataset.dir
    if project.dataset_dir.exists() or data_stage(project) is not None:
        return
    pointer = project.root / f"{folder}.dvc"
    if not pointer.exists():
        found = f"there is no {pointer} and no stage that writes it"
    elif _checked_out(project, pointer, on_line):
        return
    else:
        found = f"{pointer} exists, but its data is not on the DVC remote"
    raise DatasetError(
        f"The dataset {folder} is missing: {found}. Copy it there and run `dvc add {folder}`, "
        "or name its s3:// address under `sources` in params.yaml."
    )


def _checked_out(project: Project, pointer: Path, on_line: Line) -> bool:
    """Check out the data of a pointer file from DVC's cache; False if it is not there."""
    limit, name = project.params.runtime.stage_timeout_s, str(pointer.relative_to(project.root))
    try:
        dvc(project.root, "checkout", name, on_line=on_line, timeout=limit)
    except CommandFailed:
        return False
    return True


def pin_source(project: Project) -> None:
    """Write the current version of the dataset's source on S3 into params.yaml.

    The version is a DVC parameter: the stage `fetch` runs again when it changes. Does nothing
    without a source, or if the user has set a version. Raises StorageError.
    """
    found = used_source(project)
    if found is None:
        return
    name, source = found
    version = current_version(source)
    if version != source.version:
        changed = {**source.model_dump(exclude_none=True), "version": version}
        project.override({"sources": {name: changed}})


def used_source(project: Project) -> tuple[str, SourceSettings] | None:
    """Name and settings of the S3 source of the dataset, if it has one."""
    stage, _, name = (data_stage(project) or "").partition("@")
    if stage != "fetch":
        return None
    return name, project.params.sources[name]


def current_version(source: SourceSettings) -> str:
    """A name for the current content of the address, unless the user has set a version.

    Raises StorageError.
    """
    if source.version is not None and not source.version.startswith(LISTING):
        return source.version
    return LISTING + digest_of(list_versions(source.uri))[:32]


def data_stage(project: Project) -> str | None:
    """The DVC stage that writes `dataset.dir` (`demo`, `fetch@<name>`), if one does."""
    params = project.params
    folder = os.path.normpath(params.dataset.dir)
    makers = {os.path.normpath("data/demo"): "demo"}
    makers |= {os.path.normpath(f"data/{name}"): f"fetch@{name}" for name in params.sources}
    return makers.get(folder)


def stage_names(project: Project) -> Sequence[str]:
    """The stages of a run in order: the one that writes the data, and those of every run.

    Stages that a user added to dvc.yaml are not part of it. Raises ConfigError if one is missing.
    """
    missing = [name for name in STAGES if name not in project.graph]
    if missing:
        raise ConfigError(
            f"{project.graph_file} has no stage {' and no stage '.join(missing)}. Restore it with "
            "`git checkout dvc.yaml`."
        )
    first = data_stage(project)
    return [*([first] if first else []), *STAGES]
