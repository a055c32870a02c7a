"""The flow `batch-predict`: a registered model over a folder or s3:// prefix, resumable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefect import flow, runtime, task

from flows.orchestration import artifacts
from flows.orchestration.children import RETRIED, StageFailedError, log_line, run_module
from flows.orchestration.gpus import gpu_slot
from flows.orchestration.prefect_log import readable_prefect_log
from flows.orchestration.run_names import model_flow_time
from flows.project.project import Project
from flows.storage.s3 import is_s3
from rfdetr.errors import ConfigError


@flow(name="batch-predict", flow_run_name=model_flow_time)
def batch_predict(
    source: str,
    out: str,
    model: str | None = None,
    threshold: float | None = None,
    draw: bool = False,
) -> dict[str, Any]:
    """Detect objects in every image of `source` and write COCO results to `out`.

    Both are folders or s3:// prefixes. `model` is an alias or version number (default: champion).
    `threshold` defaults to the model's operating point, or 0.5 if it has none.
    To resume an interrupted flow run, start it again with the same `out`.
    """
    readable_prefect_log()
    if runtime.deployment.id and not is_s3(out) and not Path(out).is_absolute():
        raise ConfigError(
            f"out is {out}, inside the worker's temporary folder: give an absolute path or an "
            "s3:// prefix."
        )
    project = Project(Path.cwd())
    with gpu_slot(project, 1):
        summary = detect(project, source, out, model, threshold, draw=draw)
    artifacts.show_predictions(summary)
    return summary


@task(**RETRIED)
def detect(
    project: Project,
    source: str,
    out: str,
    model: str | None,
    threshold: float | None,
    *,
    draw: bool,
) -> dict[str, Any]:
    """Run `rfdetr-pipeline predict` as a child process; a retry resumes after the last batch."""
    command = ["flows.cli.main", "predict", f"--out={out}", "--json"]
    command += [] if threshold is None else [f"--threshold={threshold}"]
    command += [f"--model={model}"] if model else []
    command += [] if draw else ["--no-draw"]
    command += ["--", source]  # a name may start with a hyphen
    lines: list[str] = []
    log = log_line()

    def on_line(line: str) -> None:
        lines.append(line)
        log(line)

    limit = project.params.runtime.stage_timeout_s
    run_module(project, "prediction", *command, on_line=on_line, timeout=limit)
    summary = next((line for line in reversed(lines) if line.startswith("{")), None)
    if summary is None:
        raise StageFailedError("prediction failed: it ended without a result")
    return dict(json.loads(summary))
