"""Errors as text for a user, and exit statuses."""

from __future__ import annotations

import errno
import traceback

from flows.core.redact import redact
from rfdetr.errors import RFDETRError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain(error: Exception) -> str:
    """The message of an error, without secrets.

    An error that this project did not raise itself comes with its traceback.
    """
    full = _full_disk(error)
    if full is not None:
        where = f" while writing {full.filename}" if full.filename else ""
        return f"no space left on the device{where}. Free some space, then start again."
    if isinstance(error, RFDETRError):
        return redact(str(error))
    if type(error).__module__.partition(".")[0] == "mlflow":  # a server that is down, or refuses
        return redact(f"MLflow: {error}")
    trace = "".join(traceback.format_exception(error))
    return redact(f"unexpected {type(error).__name__}\n{trace}\n{type(error).__name__}: {error}")


def is_transient(error: BaseException) -> bool:
    """Whether a retry can help: a server, a network or a crash failed, not a setting or a file."""
    return error.transient if isinstance(error, RFDETRError) else _full_disk(error) is None


def _full_disk(error: BaseException | None) -> OSError | None:
    """The write error behind `error`, which torch wraps in another one."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
