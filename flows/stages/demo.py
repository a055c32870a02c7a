"""The stage `demo`: builds the built-in dataset."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from flows.project.project import Project
from flows.stages.runner import run_stage


def demo(project: Project) -> None:
    """Write data/demo; it appears only when it is complete."""
    from rfdetr.data.demo import build_demo

    target, settings = project.root / "data/demo", project.params.demo
    work = _empty(target)
    build_demo(
        work,
        seed=settings.seed,
        classes=settings.classes,
        train=settings.train,
        valid=settings.valid,
        test=settings.test,
        progress=sys.stderr.isatty(),
    )
    work.replace(target)


def _empty(target: Path) -> Path:
    """A new folder beside `target`, which is removed."""
    work = target.with_name(f".{target.name}.partial")
    for folder in (work, target):
        shutil.rmtree(folder, ignore_errors=True)
    work.parent.mkdir(parents=True, exist_ok=True)
    return work


if __name__ == "__main__":
    raise SystemExit(run_stage("demo", ["demo"], demo, sys.argv[1:]))
