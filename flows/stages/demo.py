"""The stage `demo`: builds the built-in dataset."""

from __future__ import annotations

import sys

from flows.project.project import Project
from flows.stages.runner import run_stage
from rfdetr.files import new_folder


def demo(project: Project) -> None:
    """Write data/demo."""
    from rfdetr.data.demo import build_demo

    settings = project.params.demo
    with new_folder(project.root / "data/demo") as folder:
        build_demo(
            folder,
            seed=settings.seed,
            classes=settings.classes,
            train=settings.train,
            valid=settings.valid,
            test=settings.test,
            progress=sys.stderr.isatty(),
        )


if __name__ == "__main__":
    raise SystemExit(run_stage("demo", ["demo"], demo, sys.argv[1:]))
