"""JSON files and atomic copies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rfdetr.errors import ConfigError
from rfdetr.files import atomic_path, write_text_atomic


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
