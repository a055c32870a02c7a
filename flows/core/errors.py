"""Errors as text for a user, and exit statuses.

What the machine, the user or a server did is one text without a traceback. A traceback means a bug
of this project, and says so.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import traceback
from collections.abc import Iterator

from flows.core.redact import redact
from rfdetr.errors import RFDETRError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)
REPORT = "This is a bug in rfdetr-pipeline. Please report it, with the lines above."
# Libraries whose own exceptions are about servers, files and settings -> how they are called.
LIBRARIES = {
    "mlflow": "MLflow",
    "dvc": "DVC",
    "dvc_objects": "DVC",
    "dvc_data": "DVC",
    "scmrepo": "git",
    "_pygit2": "git",
    "dulwich": "git",
    "prefect": "Prefect",
    "httpx": "the connection to a server failed",
    "httpcore": "the connection to a server failed",
    "requests": "the connection to a server failed",
    "urllib3": "the connection to a server failed",
    "botocore": "S3",
    "sqlalchemy": "the database",
    "filelock": "the lock file",
}
READERS = ("dulwich", "scmrepo")  # raise ValueError and the like for damaged files of git


def explain(error: Exception) -> str:
    """The message of an error, without secrets; a traceback only for a bug of this project."""
    full = _full_disk(error)
    if full is not None:
        where = f" while writing {full.filename}" if full.filename else ""
        return f"no space left on the device{where}. Free some space, then start again."
    if isinstance(error, RFDETRError):
        return redact(str(error))
    for found in _causes(error):
        text = _of_environment(found)
        if text is not None:
            return redact(text)
    trace = "".join(traceback.format_exception(error))
    first = next(iter(str(error).splitlines()), "")
    return redact(f"unexpected {type(error).__name__}: {first}\n{trace}\n{REPORT}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised from; a database error first, which is wrapped."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__
    yield from (e for e in chain if isinstance(e, sqlite3.Error))
    yield from chain


def _of_environment(error: BaseException) -> str | None:
    """The text for an error that the machine or a server caused; None for another one."""
    message = str(error).strip()
    if isinstance(error, RFDETRError):
        return message
    if isinstance(error, sqlite3.Error) or "sqlite3.OperationalError" in message:
        return _of_database(message)
    if isinstance(error, OSError) and error.errno is not None:
        return _of_system(error)
    return _of_library(error, message)


def _of_library(error: BaseException, message: str) -> str | None:
    if any(module.startswith("prefect.settings") for module in _modules(error)):
        cause = message.partition(" [type=")[0].replace(
            "\n", ": "
        )  # pydantic's description follows
        return (
            f"Prefect's settings are not valid: {cause}. Check PREFECT_API_URL and the other "
            "PREFECT_ variables, prefect.toml here and profiles.toml in ~/.prefect."
        )
    text = _of_python(error, message) or _without_space(message)
    package = type(error).__module__.partition(".")[0]
    if text is not None or package not in LIBRARIES:
        return text
    message = message.partition("\n(Background on this error")[0]  # SQLAlchemy's manual
    if package == "dvc" and "dvc.lock" in message:
        message += ". Restore the file with `git checkout dvc.lock`, or remove it"
    return f"{LIBRARIES[package]}: {message or type(error).__name__}"


def _of_python(error: BaseException, message: str) -> str | None:
    if isinstance(error, ConnectionError | TimeoutError):
        return f"the connection to a server failed: {message or type(error).__name__}"
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name} is missing. Run `make setup` or install it; start again."
    if isinstance(error, UnicodeEncodeError) and "surrogates" in message:
        return (
            f"the name of a file or folder has bytes that are not text here ({message}). Set "
            "LANG=C.UTF-8, or rename it; then start again."
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _without_memory(message)
    raised_in = [""] + [module.partition(".")[0] for module in _modules(error)]
    if type(error).__module__ == "builtins" and raised_in[-1] in READERS:
        return f"git: {message}. A file of the repository is damaged; `git status` names it."
    return None


def _without_memory(message: str) -> str:
    return (
        f"not enough memory ({message.splitlines()[0] if message else 'RAM'}). Set a smaller "
        "fit.batch_size (effective_batch_size keeps the result) or fewer runtime.num_workers."
    )


def _without_space(message: str) -> str | None:
    """The text for a full disk, if a library put the system's words into its own."""
    if os.strerror(errno.ENOSPC) not in message:
        return None
    return (
        f"no space left on the device ({message.splitlines()[-1].strip()}). Free some space, "
        "or set TMPDIR or RFDETR_STATE_DIR to another folder; then start again."
    )


def _modules(error: BaseException) -> list[str]:
    """The modules that the error passed through; it was raised in the last one."""
    step, names = error.__traceback__, []
    while step is not None:
        names.append(str(step.tb_frame.f_globals.get("__name__", "")))
        step = step.tb_next
    return names


def _of_database(message: str) -> str:
    text = message.splitlines()[0]
    if "locked" in message:
        return (
            f"the database is in use by another process ({text}). Wait until it has finished, or "
            "find it with `fuser mlflow.db`, then start again."
        )
    return f"the database cannot be used: {text}. Check the file and its folder."


def _of_system(error: OSError) -> str:
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    if error.errno == errno.ENOENT and not files:  # os.getcwd() does not name the folder
        return "the current folder was deleted. Change to the project folder, then start again."
    text = f"{' -> '.join(files)}: {error.strerror}" if files else str(error.strerror or error)
    if error.errno in NO_RIGHT:
        return (
            f"{text}. Give this user the right to write there, or use another folder "
            "(RFDETR_STATE_DIR for state and caches, TMPDIR for temporary files)."
        )
    return f"{text}. Check that path, then start again."


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
