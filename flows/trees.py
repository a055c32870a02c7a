"""Folders to and from s3:// prefixes."""

from __future__ import annotations

import os
from pathlib import Path

from tqdm import tqdm

from flows.digest import list_files
from flows.s3 import Address, StorageError, list_objects, make_client, on_threads
from flows.storage import download, upload


def download_tree(uri: str, folder: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Fetch everything under a prefix into a new `folder`.

    Files land in `.<name>.partial` first, so that the folder appears only complete; a second call
    goes on where the first stopped. Raises StorageError, also when the folder exists.
    """
    target = Path(folder)
    if target.exists():
        raise StorageError(f"{target} exists already; remove it or fetch to another folder.")
    client = make_client()
    prefix = str(Address.parse(uri)).rstrip("/") + "/"
    objects = list(list_objects(uri, client))
    if not objects:
        raise StorageError(f"{prefix}: nothing is there.")
    work = target.with_name(f".{target.name}.partial")
    with tqdm(
        total=sum(size for _, size in objects),
        unit="B",
        unit_scale=True,
        desc=target.name,
        disable=not progress,
    ) as bar:

        def fetch(item: tuple[str, int]) -> None:
            path = _inside(work, item[0].removeprefix(prefix))
            if not path.exists() or path.stat().st_size != item[1]:
                download(item[0], path, progress=False, client=client)
            bar.update(item[1])

        on_threads(fetch, objects)
    work.replace(target)
    return target


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
