"""What the flows make of the errors and the pictures of their children."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prefect.states import Completed, Failed

from flows.core.child_report import VARIABLE, child_report, report_failure, report_start
from flows.core.process import CommandFailed
from flows.orchestration.artifacts import small_enough
from flows.orchestration.children import StageFailedError, retry_can_help, run_module
from flows.orchestration.prefect_log import readable_prefect_log
from flows.project.project import Project
from flows.storage.s3 import AccessError, NotFoundError, StorageError
from rfdetr.errors import ConfigError, DatasetError, DownloadError


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConfigError("a wrong value"), False),
        (DatasetError("a missing file"), False),
        (NotFoundError("a missing object"), False),
        (AccessError("wrong credentials"), False),
        (OSError(28, "No space left on device"), False),
        (StorageError("a server that is down"), True),
        (DownloadError("a server that is down"), True),
        (CommandFailed(["git"], 1, [], "failed"), True),
        (RuntimeError("a bug, or a library's error"), True),
    ],
)
def test_only_what_may_pass_by_itself_is_tried_again(
    error: Exception, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the error happens in a child, whose report carries the kind."""
    assert retry_can_help(None, None, Failed(data=error)) is again
    with child_report() as report:
        monkeypatch.setenv(VARIABLE, report.variables[VARIABLE])
        report_start()
        assert report.transient, "a child that was killed may be started again"
        report_failure("stage failed", error)
        assert report.transient is again
        assert str(error) in report.error or "no space left" in report.error


def test_a_state_without_an_error_is_tried_again() -> None:
    assert retry_can_help(None, None, Completed())


def test_the_error_of_a_real_child_has_its_text_and_kind(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("fit: {epoch: 3}\n")
    command = ("flows.inference.drift", str(tmp_path))
    with pytest.raises(StageFailedError, match=r"drift check failed: .*params.yaml has") as caught:
        run_module(Project(tmp_path), "drift check", *command, on_line=lambda line: None)
    assert not caught.value.transient


def test_an_expected_error_is_logged_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    readable_prefect_log()
    logger, stream = logging.getLogger("prefect.task_runs"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.filters = [f for h in logging.getLogger().handlers for f in h.filters] or [
        f for h in logger.handlers for f in h.filters
    ]
    logger.addHandler(handler)
    try:
        for error in (StageFailedError("stage fit failed: no GPU"), KeyError("bug")):
            try:
                raise error  # noqa: TRY301
            except Exception:
                logger.exception("Task run failed with exception: %r", error)
    finally:
        logger.removeHandler(handler)
    expected, bug = stream.getvalue().split("Task run failed", 1)
    assert expected == "stage fit failed: no GPU\n"
    assert "Traceback" in bug


def test_a_picture_becomes_small_enough_for_prefect() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    assert len(stream.getvalue()) > 3_000_000
    small = small_enough(stream.getvalue(), limit=300_000)
    assert len(small) <= 300_000
    with Image.open(io.BytesIO(small)) as picture:
        assert picture.format == "JPEG"
        assert picture.width > 200
    assert small_enough(b"few bytes") == b"few bytes"
