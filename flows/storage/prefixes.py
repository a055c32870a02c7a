"""Folders to and from s3:// prefixes."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tqdm import tqdm

from flows.core.digest import list_files
from flows.storage.objects import download, upload
from flows.storage.s3 import (
    Address,
    Listed,
    StorageError,
    head,
    list_objects,
    make_client,
    on_threads,
)


def download_tree(uri: str, folder: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Fetch everything under a prefix into a new `folder`.

    Files land in `.<name>.partial` first, so that the folder appears only complete; a second call
    goes on where the first stopped, if what the first fetched is still what the prefix holds.
    Raises StorageError, also when the folder exists.
    """
    target = Path(folder)
    if target.exists():
        raise StorageError(f"{target} exists already; remove it or fetch to another folder.")
    client = make_client()
    prefix = str(Address.parse(uri)).rstrip("/") + "/"
    objects = list(list_objects(uri, client))
    if not objects:
        raise StorageError(f"{prefix}: nothing is there.")
    partial = _PartialTree(target, [item.address.removeprefix(prefix) for item in objects])
    with tqdm(
        total=sum(item.size for item in objects),
        unit="B",
        unit_scale=True,
        desc=target.name,
        disable=not progress,
    ) as bar:

        def fetch(item: Listed) -> None:
            name = item.address.removeprefix(prefix)
            if not partial.holds(name, item.etag):
                download(item.address, partial.path(name), progress=False, client=client)
                partial.note(name, item.etag)
            bar.update(item.size)

        on_threads(fetch, objects)
    partial.finish(target)
    return target


class _PartialTree:
    """The finished files of a folder's download, and a list of their ETags beside it."""

    def __init__(self, target: Path, names: list[str]) -> None:
        self.folder = target.with_name(f".{target.name}.partial")
        self.journal = target.with_name(f".{target.name}.partial.etags")
        lines = self.journal.read_text("utf-8").splitlines() if self.journal.exists() else []
        self.etags = dict(map(_etag_line, lines))
        self._drop_others({self.path(name) for name in names})

    def path(self, name: str) -> Path:
        return _inside(self.folder, name)

    def holds(self, name: str, etag: str) -> bool:
        return self.etags.get(name) == etag and self.path(name).is_file()

    def note(self, name: str, etag: str) -> None:
        with open(self.journal, "a", encoding="utf-8") as stream:
            stream.write(json.dumps([name, etag]) + "\n")

    def finish(self, target: Path) -> None:
        self.folder.replace(target)
        self.journal.unlink(missing_ok=True)

    def _drop_others(self, wanted: set[Path]) -> None:
        """Remove what an earlier listing held and today's does not."""
        for path in sorted(self.folder.resolve().rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in wanted and _unfinished(path) not in wanted:
                path.unlink()


def _etag_line(line: str) -> tuple[str, str]:
    """Name and ETag; a line that was cut off stands for nothing."""
    try:
        name, etag = json.loads(line)
    except ValueError:
        return "", ""
    return str(name), str(etag)


def _unfinished(path: Path) -> Path:
    """The file that `path`, a part of an interrupted download, would become."""
    name = path.name.removesuffix(".parts").removesuffix(".partial")
    return path.with_name(name.removeprefix("."))


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise StorageError(f"the object name '{name}' leads out of {folder}; refused.")
    return path


def upload_tree(folder: str | os.PathLike[str], uri: str, *, progress: bool = True) -> int:
    """Send every file of `folder` under a prefix; the number of files. Unchanged ones are kept."""
    root = Path(folder)
    if not root.is_dir():
        raise StorageError(f"{root} is no folder.")
    client = make_client()
    prefix = str(Address.parse(uri)).rstrip("/")
    files = list(list_files(root))
    with tqdm(
        total=sum(status.st_size for _, status in files),
        unit="B",
        unit_scale=True,
        desc=root.name,
        disable=not progress,
    ) as bar:

        def send(item: tuple[str, os.stat_result]) -> None:
            upload(root / item[0], f"{prefix}/{item[0]}", progress=False, client=client)
            bar.update(item[1].st_size)

        on_threads(send, files)
    return len(files)


def fetch(uri: str, target: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Fetch an object, or a prefix when `uri` ends in "/" or there is no object of that name."""
    from flows.storage.prefixes import download_tree

    if uri.endswith("/"):  # an object of that name is a folder marker
        return download_tree(uri, target, progress=progress)
    try:
        head(uri)
    except StorageError as error:
        if "does not exist" not in str(error):
            raise
        return download_tree(uri, target, progress=progress)
    return download(uri, target, progress=progress)
