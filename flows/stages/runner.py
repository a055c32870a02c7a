"""What every stage shares: its parameters, its end, and the promise that both belong together."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flows.config.params import PARAMS_FILE, Params, load_params
from flows.core.process import die_with_parent, exit_on_sigterm
from flows.core.quiet import quiet_libraries
from flows.core.redact import redact
from rfdetr.errors import ConfigError, RFDETRError
from rfdetr.files import atomic_path, write_text_atomic

INTERRUPTED = 130
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_stage(
    name: str,
    sections: Sequence[str],
    body: Callable[[Params], None],
    arguments: Sequence[str] = (),
) -> int:
    """Run `body` with the checked parameters; the exit status of the process.

    A stage reads params.yaml alone: with `arguments` it says so and does nothing.
    `sections` are those that dvc.yaml tracks for the stage. They are compared with params.yaml
    again at the end: DVC records the values it finds then, and they must be those that acted.
    """
    if arguments:
        print(f"usage: python -m flows.{name}, without arguments: {PARAMS_FILE} has the settings")
        return 0 if arguments[0] in {"-h", "--help"} else 2
    die_with_parent()
    exit_on_sigterm()
    quiet_libraries()
    try:
        params = load_params()
        body(params)
        check_unchanged(params, sections)
    except KeyboardInterrupt:
        print(f"{name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last line of a stage says what happened
        print(f"{name} failed: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def explain(error: Exception) -> str:
    """One readable text; the traceback comes first when the error is none of ours."""
    full = _full_disk(error)
    if full is not None:
        where = f" while writing {full.filename}" if full.filename else ""
        return f"no space left on the device{where}. Free some, then start again."
    if isinstance(error, RFDETRError):
        return redact(str(error))
    if type(error).__module__.partition(".")[0] == "mlflow":  # a server that is away, or refuses
        return redact(f"MLflow: {error}")
    trace = "".join(traceback.format_exception(error))
    return redact(f"unexpected {type(error).__name__}\n{trace}\n{type(error).__name__}: {error}")


def _full_disk(error: BaseException | None) -> OSError | None:
    """The write error behind `error`; torch's writer hides it behind one of its own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def check_unchanged(params: Params, sections: Sequence[str]) -> None:
    """Raise ConfigError if params.yaml no longer holds the values that the stage used."""
    now = load_params().snapshot(*sections)
    used = params.snapshot(*sections)
    changed = [
        f"{section}.{field} was {value!r}, is {now[section].get(field)!r}"
        for section, fields in used.items()
        for field, value in fields.items()
        if now[section].get(field) != value
    ]
    if changed:
        raise ConfigError(
            f"{PARAMS_FILE} changed while the stage ran: {'; '.join(changed)}. The result belongs "
            "to the old values; start the stage again."
        )


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write plain data as readable JSON in one step."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Plain data of a JSON file. Raises ConfigError that names a missing or broken file."""
    file = Path(path)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; run the stage that writes it.") from None
    except ValueError as error:
        raise ConfigError(f"{file} is no valid JSON: {error}") from None


def copy_atomic(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy one file so that `target` is never half-written."""
    import shutil

    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
