"""The stage `fetch NAME`: a dataset from S3."""

from __future__ import annotations

import functools
import shutil
import sys

from flows.config.sections import SourceSettings
from flows.project.project import Project
from flows.project.workspace import current_version
from flows.stages.runner import run_stage
from flows.storage.prefixes import fetch
from flows.storage.s3 import StorageError
from rfdetr.errors import ConfigError


def fetch_source(name: str, project: Project) -> None:
    """Fetch `sources.<name>` to data/<name>; an interrupted transfer is resumed.

    Raises StorageError, also if S3 holds another version than the one in params.yaml.
    """
    sources, target = project.params.sources, project.root / "data" / name
    if name not in sources:
        known = ", ".join(sources) or "none"
        raise ConfigError(f"sources has no entry '{name}'. Known: {known}.")
    source = sources[name]
    _check_version(source)
    shutil.rmtree(target, ignore_errors=True)
    fetch(source.uri, target)
    _check_version(source)  # it can change during the transfer


def _check_version(source: SourceSettings) -> None:
    if source.version is not None and current_version(source) != source.version:
        raise StorageError(
            f"{source.uri} has changed: its version is no longer {source.version}, as in "
            "params.yaml. `rfdetr-pipeline retrain` uses the current data; `dvc pull` gets the old."
        )


def main(arguments: list[str]) -> int:
    """`python -m flows.stages.fetch NAME`."""
    match arguments:
        case [name] if not name.startswith("-"):
            return run_stage(
                f"fetch {name}", [("sources", name)], functools.partial(fetch_source, name)
            )
    print(main.__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
