"""What Prefect logs about a flow run: a traceback only for a bug of this project."""

from __future__ import annotations

import logging

from flows.core.errors import REPORT, explain
from flows.core.stopping import reclaim_sigterm, stopping

LOGGERS = ("root", "prefect", "prefect._internal", "prefect.flow_runs", "prefect.task_runs")


class _Readable(logging.Filter):
    """Removes the traceback of expected errors, and everything after a request to stop."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        text = explain(error) if isinstance(error, Exception) else REPORT
        if not text.endswith(REPORT):
            record.exc_info = record.exc_text = None
            record.msg, record.args = "%s", (text,)
        return not stopping()


def readable_prefect_log() -> None:
    """Apply the filter to the handlers that Prefect installed, and take SIGTERM back from it.

    Every flow calls it first, because a worker starts the flow without our command line. Repeating
    the call is harmless.
    """
    import prefect.main  # noqa: F401 - installs the handlers

    reclaim_sigterm()
    for name in LOGGERS:
        for handler in logging.getLogger(None if name == "root" else name).handlers:
            if not any(isinstance(found, _Readable) for found in handler.filters):
                handler.addFilter(_Readable())
