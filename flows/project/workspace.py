"""A folder in which one run of the pipeline works: clone, overrides, DVC settings, data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from flows.config.sections import SourceSettings
from flows.core.digest import digest_of
from flows.core.process import CommandFailed, Line
from flows.project.dvc import configure_dvc, dvc, has_remote
from flows.project.project import Project
from flows.storage.s3 import list_versions
from rfdetr.errors import DatasetError

LISTING = "listing-"  # a source's version that `pin_source` wrote begins so


def prepare_workspace(
    project: Project, changes: Mapping[str, Mapping[str, Any]], on_line: Line
) -> None:
    """Make the folder ready: overrides, the version on S3, DVC settings, and what the remote has.

    Raises DatasetError when the dataset is neither there, nor pulled, nor the product of a stage.
    """
    project.override(changes)
    pin_source(project)
    configure_dvc(project.root, project.env)
    if has_remote(project.root):
        dvc(project.root, "pull", "--allow-missing", on_line=on_line)
    require_dataset(project, on_line)


def require_dataset(project: Project, on_line: Line) -> None:
    """Raise DatasetError unless the dataset is there, in DVC's cache, or the product of a stage."""
    root, folder = project.root, project.params.dataset.dir
    if not (root / folder).exists() and data_stage(project) is None:
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


def pin_source(project: Project) -> None:
    """Write what S3 holds now as the version of the dataset's source into params.yaml.

    The version is a DVC parameter: the stage `fetch` runs again when it is another one. Without a
    source, or with a version that a person wrote, nothing happens. Raises StorageError.
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
    """Name and settings of the S3 source that the dataset is fetched from, if it is."""
    stage, _, name = (data_stage(project) or "").partition("@")
    if stage != "fetch":
        return None
    return name, project.params.sources[name]


def current_version(source: SourceSettings) -> str:
    """A name of what the address holds now; a version that a person wrote stands.

    Raises StorageError.
    """
    if source.version is not None and not source.version.startswith(LISTING):
        return source.version
    return LISTING + digest_of(list_versions(source.uri))[:32]


def data_stage(project: Project) -> str | None:
    """The DVC stage that makes `dataset.dir` (`demo`, `fetch@<name>`), or None for a user's own."""
    params = project.params
    folder = os.path.normpath(params.dataset.dir)
    makers = {os.path.normpath("data/demo"): "demo"}
    makers |= {os.path.normpath(f"data/{name}"): f"fetch@{name}" for name in params.sources}
    return makers.get(folder)


def stage_names(project: Project) -> Sequence[str]:
    """The stages of a run in their order: the one that makes the data, then those of dvc.yaml."""
    first = data_stage(project)
    return [*([first] if first else []), *(n for n in project.graph if n not in ("demo", "fetch"))]
