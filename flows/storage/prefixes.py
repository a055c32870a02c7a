"""Folders to and from s3:// prefixes."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flows.core.digest import list_files
from flows.core.names import check_names, inside
from flows.storage.objects import download, upload
from flows.storage.s3 import (
    THREADS,
    TRIES,
    Address,
    ChangedError,
    Listed,
    NotFoundError,
    StorageError,
    list_objects,
    make_client,
    on_threads,
)


def fetch(uri: str, target: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Fetch an object, or a prefix if `uri` ends in "/" or there is no object of that name."""
    if uri.endswith("/"):  # an object of that name is a folder marker
        return download_tree(uri, target, progress=progress)
    try:
        return download(uri, target, progress=progress)
    except NotFoundError:
        return download_tree(uri, target, progress=progress)


def download_tree(uri: str, folder: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Fetch everything under a prefix into the new `folder`.

    Files arrive in `.<name>.partial`, so the folder appears only when it is complete. After an
    interruption the next call fetches only files that are missing or have changed since. If objects
    change or vanish meanwhile, the prefix is listed again. Raises StorageError, also if the folder
    exists, and UnsafeNameError if a name cannot be a file in it.
    """
    target = Path(folder)
    if target.exists():
        raise StorageError(f"{target} exists already; remove it or fetch to another folder.")
    client = make_client()
    prefix = str(Address.parse(uri)).rstrip("/") + "/"
    for _ in range(TRIES):
        objects = list(list_objects(uri, client))
        if not objects:
            raise NotFoundError(f"{prefix} is empty or does not exist.")
        with contextlib.suppress(ChangedError, NotFoundError):
            _download_listed(objects, prefix, target, client, progress=progress)
            return target
    raise ChangedError(f"{prefix} keeps changing. Fetch it when nothing writes there.")


def _download_listed(
    objects: list[Listed], prefix: str, target: Path, client: Any, *, progress: bool
) -> None:
    partial = _PartialTree(target, [item.address.removeprefix(prefix) for item in objects], prefix)
    with _bar(target, sum(item.size for item in objects), progress) as bar:

        def get(item: Listed) -> None:
            name = item.address.removeprefix(prefix)
            if not partial.has(name, item.etag):
                download(
                    item.address,
                    partial.path(name),
                    progress=False,
                    client=client,
                    threads=_threads_of_each(len(objects)),
                    etag=item.etag,
                )
                partial.note(name, item.etag)
            bar.update(item.size)

        on_threads(get, objects)
    partial.finish(target)


def upload_tree(folder: str | os.PathLike[str], uri: str, *, progress: bool = True) -> int:
    """Send every file of `folder` under a prefix and return their number; skips unchanged ones."""
    root = Path(folder)
    if not root.is_dir():
        raise StorageError(f"{root} is not a folder.")
    client = make_client()
    prefix = str(Address.parse(uri)).rstrip("/")
    files = list(list_files(root))
    with _bar(root, sum(status.st_size for _, status in files), progress) as bar:

        def send(item: tuple[str, os.stat_result]) -> None:
            upload(
                root / item[0],
                f"{prefix}/{item[0]}",
                progress=False,
                client=client,
                threads=_threads_of_each(len(files)),
            )
            bar.update(item[1].st_size)

        on_threads(send, files)
    return len(files)


def _bar(folder: Path, size: int, progress: bool) -> tqdm[Any]:
    return tqdm(total=size, unit="B", unit_scale=True, desc=folder.name, disable=not progress)


def _threads_of_each(files: int) -> int:
    """Files share the threads: parts of one file travel in parallel only where files are few."""
    return max(1, THREADS // files)


class _PartialTree:
    """The finished files of an unfinished download, and beside them a list of their ETags."""

    def __init__(self, target: Path, names: list[str], prefix: str) -> None:
        self.folder = target.with_name(f".{target.name}.partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        check_names(names, self.folder, prefix)
        self.journal = target.with_name(f".{target.name}.partial.etags")
        known = self.journal.read_bytes() if self.journal.exists() else b""
        self.etags = dict(map(_etag_line, known.splitlines()))
        self._keep_only({self.path(name) for name in names})

    def path(self, name: str) -> Path:
        return inside(self.folder, name)

    def has(self, name: str, etag: str) -> bool:
        return self.etags.get(name) == etag and self.path(name).is_file()

    def note(self, name: str, etag: str) -> None:
        with open(self.journal, "a", encoding="utf-8") as stream:
            stream.write(json.dumps([name, etag]) + "\n")

    def finish(self, target: Path) -> None:
        self.folder.replace(target)
        self.journal.unlink(missing_ok=True)

    def _keep_only(self, wanted: set[Path]) -> None:
        """Remove files that left the listing since, and files of interrupted transfers."""
        for path in sorted(self.folder.resolve().rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in wanted:
                path.unlink()


def _etag_line(line: bytes) -> tuple[str, str]:
    """Name and ETag; empty for a truncated or damaged line."""
    try:
        name, etag = json.loads(line)
    except (ValueError, TypeError):
        return "", ""
    return str(name), str(etag)
