"""JSON, YAML and CSV files that are replaced in one step."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from rfdetr.data.text import read_file
from rfdetr.errors import ConfigError
from rfdetr.files import atomic_path, write_text_atomic

M = TypeVar("M", bound=BaseModel)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write plain data as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Plain data of a JSON file. Raises ConfigError that names a missing or broken file."""
    file = Path(path)
    try:
        return json.loads(read_file(file).decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; run the stage that writes it.") from None
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from None


def read_object(path: str | os.PathLike[str], *needed: str) -> dict[str, Any]:
    """A JSON object that has the `needed` keys. Raises ConfigError that names what is missing."""
    found = read_json(path)
    missing = [key for key in needed if key not in found] if isinstance(found, dict) else ["object"]
    if missing:
        raise ConfigError(
            f"{path} was edited, or written by another version: it has no {', '.join(missing)}. "
            "Restore it with `dvc checkout`, or remove it and run the stage that writes it."
        )
    return dict(found)


def read_record(path: str | os.PathLike[str], kind: type[M]) -> M:
    """A record of a JSON file. Raises ConfigError if it is missing, or has other fields."""
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the record"
        raise ConfigError(
            f"{path} was edited, or written by another version: {where}: {first['msg']}. Remove "
            "it, and run the command that writes it again."
        ) from None


def parse_yaml(text: str, *, origin: str) -> Any:
    """Plain data of YAML 1.2, as DVC reads it. Raises ConfigError, also for a repeated key."""
    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        require_merged(text, origin)
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        tabs = any(line.lstrip(" ").startswith("\t") for line in text.splitlines())
        way = " Indent with spaces, not with tabs." if tabs else ""
        raise ConfigError(f"{origin} is not valid YAML: {problem}{place}.{way}") from None


def require_merged(text: str, origin: str) -> None:
    """Raise ConfigError if `text` contains the conflict markers of git."""
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("<<<<<<< "):
            raise ConfigError(
                f"{origin} has a merge conflict in line {number}. Resolve it in an editor, or take "
                "one side (`git checkout --ours` or `--theirs`, then the file); then start again."
            )


def read_yaml(path: Path) -> Any:
    """Plain data of a YAML file. Raises ConfigError that names a missing or broken file."""
    try:
        return parse_yaml(read_file(path).decode("utf-8"), origin=str(path))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; run from the project's root folder.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}.") from None


def write_csv(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Write rows under a header, atomically. `columns` default to the keys of the first row."""
    names = columns or (list(rows[0]) if rows else [])
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.DictWriter(stream, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def copy_atomic(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy one file so that `target` is never half-written."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
