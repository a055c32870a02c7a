"""Prefect artifacts of a flow run: dataset report, training progress, gate decision, images.

Artifacts are best effort: a failure is logged as a warning and never ends the flow run.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Self
from uuid import UUID

from PIL import Image
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from flows.core.redact import redact
from flows.gate.verdict import Verdict
from rfdetr.progress import EpochProgress

LOGGER = logging.getLogger(__name__)
TIMEOUT_S = 10.0
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.1)  # of the sides of a picture that is too large
MAX_IMAGE_BYTES = 400_000  # Prefect stores images as text in its database
P = ParamSpec("P")


def best_effort(show: Callable[P, None]) -> Callable[P, None]:
    """Turn failures of `show` into warnings.

    With Prefect's own settings, each attempt to reach an unavailable server takes minutes.
    """
    quick = {PREFECT_CLIENT_MAX_RETRIES: 0, PREFECT_API_REQUEST_TIMEOUT: TIMEOUT_S}

    @wraps(show)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with temporary_settings(quick):
                show(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - an artifact must never fail a flow run
            LOGGER.warning("%s was not shown: %s", show.__name__, redact(str(error)))

    return guarded


@best_effort
def show_dataset_report(reports: Path) -> None:
    """Show the Markdown report of the validate stage."""
    file = reports / "validation.md"
    if file.exists():
        create_markdown_artifact(file.read_text(encoding="utf-8"), key="dataset-report")


@best_effort
def show_images(*places: Path) -> None:
    """Show pictures: files, and the PNG files of folders."""
    for place in places:
        for file in sorted(place.glob("*.png")) if place.is_dir() else [place]:
            if file.exists():
                _show_image(file)


@best_effort
def show_drift(report: Path, plot: Path) -> None:
    """Show the report of a drift check and its histograms."""
    create_markdown_artifact(report.read_text(encoding="utf-8"), key="drift-report")
    _show_image(plot)


@best_effort
def show_predictions(summary: Mapping[str, Any]) -> None:
    """Show the summary of a batch prediction."""
    rows = [{"": name, "value": redact(str(value))} for name, value in summary.items()]
    create_table_artifact(rows, key="predictions")


@best_effort
def show_verdict(verdict: Verdict) -> None:
    """Show the decision with its rules, and the metrics of both models."""
    create_markdown_artifact(redact(verdict.to_markdown()), key="gate-decision")
    old, new = verdict.champion, verdict.challenger
    rows = [
        {
            "metric": name,
            "champion": "" if old is None else _number(old.metrics.get(name)),
            "challenger": _number(value),
        }
        for name, value in new.metrics.items()
    ]
    rows += [
        {
            "metric": f"AP {name}",
            "champion": ""
            if old is None
            else _number(getattr(old.per_class.get(name), "ap", None)),
            "challenger": _number(score.ap),
        }
        for name, score in new.per_class.items()
    ]
    create_table_artifact(rows, key="champion-against-challenger")


@best_effort
def show_links(links: Sequence[tuple[str, str, str]]) -> None:
    """Show links, given as (key, URL, text); only http URLs can be opened."""
    for key, address, text in links:
        if address.startswith(("http://", "https://")):
            create_link_artifact(address, link_text=text, key=key)


class TrainingProgress:
    """Reads the output of the fit stage and updates a progress artifact.

    A thread calls the server, so that reading the output never waits for it. Use as a context
    manager.
    """

    def __init__(self) -> None:
        self._artifact: UUID | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="progress")
        self._run = copy_context()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def read(self, line: str) -> None:
        """Update the artifact if a line of output reports a finished epoch."""
        progress = EpochProgress.parse(line)
        if progress is not None:
            self._thread.submit(self._run.run, self._show, progress)

    @best_effort
    def _show(self, progress: EpochProgress) -> None:
        percent = 100.0 * progress.epoch / max(1, progress.of)
        text = f"epoch {progress.epoch} of {progress.of}, mAP {progress.mAP}"
        if self._artifact is None:
            made = create_progress_artifact(percent, key="training", description=text)
            self._artifact = made if isinstance(made, UUID) else None
        else:
            update_progress_artifact(self._artifact, percent, description=text)


def _show_image(file: Path) -> None:
    data = base64.b64encode(small_enough(file.read_bytes())).decode("ascii")
    key = file.stem.lower().replace("_", "-")
    kind = "jpeg" if data.startswith("/9j/") else "png"
    create_image_artifact(f"data:image/{kind};base64,{data}", key=key, description=file.name)


def small_enough(image: bytes, limit: int = MAX_IMAGE_BYTES) -> bytes:
    """The image file, as a JPEG of fewer pixels if it has more than `limit` bytes."""
    if len(image) <= limit:
        return image
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    for share in SHARES:
        size = (max(1, int(picture.width * share)), max(1, int(picture.height * share)))
        stream = io.BytesIO()
        picture.resize(size).save(stream, "JPEG", quality=85)
        if stream.tell() <= limit:
            break
    return stream.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
