"""What orchestration costs: the Prefect flow against `dvc repro` of the same tiny project.

    python -m tests.benchmarks.bench_flow [--folder FOLDER]

Prints the time of the bare stages, of the flow, its split (start of the temporary server, each
task, release) and of the second runs. Ends with status 1 when an unchanged stage costs more than
1.5 s, a run without work more than 15 s, or orchestration more than 30 s and 5 % of the stages.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from tests.flows.projects import environment, make_project

UNCHANGED_S, NOTHING_S, MORE_S, MORE_PART = 1.5, 15.0, 30.0, 0.05
STAGES = ("demo", "validate", "convert", "fit", "evaluate")
LINE = re.compile(r"(\d\d:\d\d:\d\d\.\d{3}) .*?(?:Task run '([\w-]+)'|Flow run)")


def timed(root: Path, *command: str) -> tuple[float, str]:
    """Seconds and output of a command in the project."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=root,
        env=environment(root, PREFECT_HOME=str(root.parent / "prefect"), PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout[-3000:]}")
    return time.perf_counter() - started, done.stdout


def split(log: str) -> dict[str, float]:
    """Seconds from the end of one task to the end of the next, by the task's name."""
    found: dict[str, float] = {}
    last: datetime | None = None
    for line in log.splitlines():
        match = LINE.match(line)
        if not match or ("Finished in state" not in line and "Beginning flow run" not in line):
            continue
        now = datetime.strptime(match[1], "%H:%M:%S.%f")
        if last is not None and match[2]:
            name = re.sub(r"-[0-9a-f]{3}$", "", match[2])
            found[name] = (now - last).total_seconds()
        last = now
    return found


def project(folder: Path) -> Path:
    root = make_project(folder / "project", fit={"epochs": 1})
    timed(root, "dvc", "config", "--local", "core.no_scm", "true")
    return root


def show(title: str, seconds: float, log: str = "") -> dict[str, float]:
    print(f"{title:42} {seconds:7.1f} s")
    parts = split(log)
    for name, part in parts.items():
        print(f"    {name:38} {part:7.1f} s")
    if parts:
        print(f"    {'server, imports, end of the flow':38} {seconds - sum(parts.values()):7.1f} s")
    return parts


def measure(folder: Path) -> int:
    """Run both ways and print; the exit status."""
    bare, _ = timed(project(folder / "bare"), "dvc", "repro")
    show("dvc repro, everything", bare)
    root = project(folder / "flow")
    full, log = timed(root, "flows.cli.main", "retrain")
    parts = show("rfdetr-pipeline retrain, everything", full, log)
    again, _ = timed(root, "flows.cli.main", "retrain")
    show("rfdetr-pipeline retrain, nothing to do", again)
    unchanged = {}
    for stage in STAGES:
        unchanged[stage], _ = timed(root, "dvc", "repro", "--single-item", stage)
        show(f"dvc repro of the unchanged stage {stage}", unchanged[stage])
    orchestration = sum(parts.get(stage, 0.0) for stage in STAGES) - bare
    print(f"{'stages in the flow over the bare stages':42} {orchestration:7.1f} s")
    slow = [stage for stage, seconds in unchanged.items() if seconds > UNCHANGED_S]
    problems = [f"unchanged stage {stage} took over {UNCHANGED_S} s" for stage in slow]
    if again > NOTHING_S:
        problems.append(f"a run without work took over {NOTHING_S} s")
    if orchestration > max(MORE_S, MORE_PART * bare):
        problems.append("orchestration costs too much")
    print("\n".join(problems) or "within the limits")
    return int(bool(problems))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keep the projects here")
    options = parser.parse_args()
    os.environ.update(DO_NOT_TRACK="1", DVC_NO_ANALYTICS="true", MLFLOW_DISABLE_TELEMETRY="true")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="bench-flow-"))
    try:
        return measure(folder)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
