"""The flow `batch-predict`: a registered model over a folder or s3:// prefix, resumable."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE

from flows.core.process import CommandFailed, run_streaming
from flows.orchestration import artifacts
from flows.orchestration.children import StageFailedError, cause, log_line
from flows.orchestration.gpus import gpu_slot
from flows.project.project import Project
from flows.storage.s3 import is_s3
from rfdetr.errors import ConfigError


@flow(name="batch-predict")
def batch_predict(
    source: str,
    out: str,
    model: str | None = None,
    threshold: float = 0.5,
    draw: bool = False,
) -> dict[str, Any]:
    """Detect on every image of `source` and write COCO results to `out`: folders or s3:// prefixes.

    `model` is an alias or version number (default: champion). A run that was killed goes on where
    it stopped when it is started again with the same `out`.
    """
    if runtime.deployment.id and not is_s3(out) and not Path(out).is_absolute():
        raise ConfigError(
            f"out is {out}, inside the worker's temporary folder: give an absolute folder or an "
            "s3:// prefix."
        )
    project = Project(Path.cwd())
    with gpu_slot(project, 1):
        found = detect(project.root, source, out, model, threshold, draw=draw)
    artifacts.show_predictions(found)
    return found


@task(retries=2, retry_delay_seconds=[10, 60], cache_policy=NO_CACHE)
def detect(
    root: Path, source: str, out: str, model: str | None, threshold: float, *, draw: bool
) -> dict[str, Any]:
    """`rfdetr-pipeline predict` in a child process; a retry goes on after the last batch."""
    command = [sys.executable, "-m", "flows.cli.main", "predict", source, "--out", out, "--json"]
    command += ["--threshold", str(threshold)]
    command += ["--model", model] if model else []
    command += [] if draw else ["--no-draw"]
    lines: list[str] = []
    log = log_line()

    def on_line(line: str) -> None:
        lines.append(line)
        log(line)

    try:
        run_streaming(command, on_line, cwd=root)
    except CommandFailed as error:
        raise StageFailedError(f"prediction failed: {cause('error', error)}") from error
    answer = next(line for line in reversed(lines) if line.startswith("{"))
    return dict(json.loads(answer))
