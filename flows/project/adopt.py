"""Takes a dataset into the project: below data/, in a layout that training reads, under DVC."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

from flows.config.starter import DatasetFacts
from flows.core.digest import list_files
from flows.project.dvc import configure_dvc, dvc
from flows.project.facts import read_facts
from flows.project.project import Project
from flows.project.workspace import data_stage
from flows.storage.packs import open_dataset
from rfdetr.data.layouts import Kind, Layout, detect_layout
from rfdetr.errors import ConfigError, DatasetError
from rfdetr.files import remove_dead_folders, scratch_folder
from rfdetr.importers import Shares, import_dataset, opened_source

DATA = "data"
DEMO = "demo"
EXPORT = re.compile(r"\.v\d+i?([.-].*)?$")  # of Roboflow: trees.v3i.coco
HIDDEN = shutil.ignore_patterns(".*", "__MACOSX")


class Adopted(NamedTuple):
    """A dataset below data/, and how it came there."""

    facts: DatasetFacts
    told: str


def dataset_name(given: str | None, source: Path) -> str:
    """The name that the user gave, else one made from the source's. Raises ConfigError."""
    own = EXPORT.sub("", source.stem if source.is_file() else source.name)
    name = given or re.sub(r"[^A-Za-z0-9._-]+", "-", own).strip("-._") or "data"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(
            f"--name {name}: use letters, digits, '.', '_' and '-', beginning with a letter or "
            "digit; it names the folder below data/ and the registered model."
        )
    if name == DEMO:
        raise ConfigError("the name demo belongs to the built-in dataset; choose one with --name.")
    return name


def adopt(
    project: Project,
    source: Path,
    name: str,
    *,
    shares: Shares | None,
    seed: int,
    force: bool,
    progress: bool,
) -> Adopted:
    """Make `source`, a folder or a zip file, a dataset below data/.

    A folder below data/ with splits stays where it is. Anything else is copied to data/<name>, and
    converted if its layout is another or it has no splits. Repeating a call changes nothing. Raises
    DatasetError if nothing can be trained, also if data/<name> has another content, unless `force`
    is set.
    """
    facts = partial(read_facts, state_dir=project.env.state_dir, name=name, source=source)
    data, target = (project.root / DATA).resolve(), project.root / DATA / name
    remove_dead_folders(data)
    try:
        with opened_source(source.resolve(), target) as place:
            layout = None if shares else _layout(open_dataset(place, project.env.state_dir))
            if layout is not None and source.is_dir() and data in place.parents:
                where = f"{DATA}/{place.relative_to(data).as_posix()}"
                return Adopted(facts(place, layout.kind, dir=where), "used where it is")
            if target.resolve() == place:
                target = target.with_name(f"{name}-imported")
            with scratch_folder(target) as fresh:
                if layout is not None and _is_complete(layout):
                    told = _copy(source, place, fresh)
                    kind: Kind = layout.kind
                else:
                    report = import_dataset(
                        place,
                        fresh,
                        shares=shares,
                        seed=seed,
                        cache_dir=project.env.state_dir / "checks",
                        progress=progress,
                    )
                    summary = report.to_text(written=False)
                    kind, told = "roboflow", f"imported from {source}\n{summary}"
                found = facts(fresh, kind, dir=f"{DATA}/{target.name}")
                _put(fresh, target, force=force)
    except OSError as error:
        raise DatasetError(f"{target} cannot be written: {error}.") from error
    return Adopted(found, told)


def _copy(source: Path, place: Path, fresh: Path) -> str:
    """Copy the folder `place`, or move what was unpacked from `source`; what was done."""
    unpacked = source.is_file()
    copy = shutil.move if unpacked else shutil.copy2
    shutil.copytree(place, fresh, ignore=HIDDEN, dirs_exist_ok=True, copy_function=copy)
    return f"{'unpacked' if unpacked else 'copied'} from {source}"


def _layout(folder: Path) -> Layout | None:
    """The layout of a folder that has train and validation splits and needs no conversion."""
    for kind in ("roboflow", "coco"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the dataset report lists them
                layout = detect_layout(folder, kind)  # type: ignore[arg-type]
        except DatasetError:
            continue
        if {"train", "val"} <= layout.splits.keys():
            return layout
    return None


def _is_complete(layout: Layout) -> bool:
    """Whether a copy of the folder is read without the original: no path leads out of it."""
    for split in layout.splits.values():
        for path in (*split.images, *filter(None, [split.annotations])):
            if layout.root not in path.parents or (path.is_file() and path.suffix == ".txt"):
                return False
    text = layout.yaml_file.read_text("utf-8", "replace") if layout.yaml_file else ""
    return re.search(r"^path\s*:\s*\S", text, re.MULTILINE) is None


def _put(fresh: Path, target: Path, *, force: bool) -> None:
    """Move a new folder to `target`, unless that has the same content already."""
    if target.exists() and _same(fresh, target):
        return
    if target.exists() and not force and any(target.iterdir()):
        raise DatasetError(
            f"{target} exists with other content: --force replaces it, --name chooses another "
            f"folder, and `rfdetr-pipeline init {target}` uses it as it is."
        )
    shutil.rmtree(target, ignore_errors=True)
    fresh.replace(target)


def _same(one: Path, other: Path) -> bool:
    names = [[name for name, _ in list_files(folder)] for folder in (one, other)]
    if names[0] != names[1]:
        return False
    _, different, unreadable = filecmp.cmpfiles(one, other, names[0], shallow=False)
    return not (different or unreadable)


def track(project: Project, folder: str) -> str:
    """Put a dataset under DVC, unless a stage writes it; what happened, as a clause."""
    if (stage := data_stage(project)) is not None:
        return f"written by the stage {stage}"
    if not (project.root / ".dvc").is_dir():
        git = any((place / ".git").exists() for place in (project.root, *project.root.parents))
        dvc(project.root, "init", "-q", *([] if git else ["--no-scm"]), on_line=_silent)
    configure_dvc(project.root, project.env)
    dvc(project.root, "add", "-q", "--", folder, on_line=_silent)
    pointer = f"{os.path.normpath(folder)}.dvc"
    return f"tracked by {pointer}"


def _silent(_line: str) -> None:
    """DVC's progress; an error carries its last lines."""
