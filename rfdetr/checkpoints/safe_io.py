"""Reading and writing weight files without ever running code from them.

A `.pth` file is a pickle. Every read goes through torch's restricted unpickler with a closed
allow-list (training specification 14.6) that holds for the duration of one call only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import re
import threading
import types
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import serialization

from rfdetr.errors import CheckpointError
from rfdetr.files import CHUNK_BYTES, atomic_path

StrPath = str | os.PathLike[str]

CHECKPOINT_SUFFIXES = (".ckpt", ".pth", ".pt")
ZIP_MAGIC = b"PK\x03\x04"
# Paths written on another system become pure paths of that system, which exist everywhere.
_PATH_CLASSES: dict[str, type[pathlib.PurePath]] = {
    "PosixPath": pathlib.PurePosixPath,
    "PurePosixPath": pathlib.PurePosixPath,
    "WindowsPath": pathlib.PureWindowsPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
    "Path": pathlib.PurePath,
    "PurePath": pathlib.PurePath,
}
_ALLOWED: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    *(
        (cls, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")  # Python 3.13 pickles the second name
        for name, cls in _PATH_CLASSES.items()
    ),
]
_lock = threading.RLock()


@contextlib.contextmanager
def _allow_list() -> Iterator[None]:
    """Exactly our allow-list, whatever other libraries registered, for the time of one read."""
    with _lock:
        registered = serialization.get_safe_globals()
        serialization.clear_safe_globals()
        try:
            with serialization.safe_globals(_ALLOWED):
                yield
        finally:
            serialization.add_safe_globals(registered)


def load_file(path: StrPath, *, mmap: bool = False, verify: bool = True) -> Any:
    """Read a torch file onto the CPU with `weights_only=True` and the closed allow-list.

    `mmap=True` maps the tensors instead of copying them (zip containers only; the older container
    is read in full). `verify=False` leaves `verify_file` to the caller. Raises FileNotFoundError
    for a missing file and CheckpointError, naming the file and the cause, for a folder, a damaged
    file or one that asks for anything outside the allow-list.
    """
    if Path(path).is_dir():
        inside = sorted(p.name for p in Path(path).iterdir() if p.suffix in CHECKPOINT_SUFFIXES)
        raise CheckpointError(
            f"{os.fspath(path)} is a folder; name a checkpoint file. Found in it: "
            f"{', '.join(inside) or 'no checkpoint'}."
        )
    is_zip = _is_zip(path)
    if verify:
        verify_file(path)
    try:
        with _allow_list(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # protocol and storage notes of torch
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except Exception as error:
        raise CheckpointError(_cause(path, error)) from error


def verify_file(path: StrPath, copy: StrPath | None = None) -> None:
    """Compare every record of a zip container with its stored checksum, which torch does not.

    `copy` is a file that was written from this one: a record with the checksum that was computed
    there is not read again. Raises CheckpointError. The older container has no checksums and
    passes, as does a file whose checksums all differ: it was written without them (a torch option).
    """
    if not _is_zip(path):
        return
    try:
        wrong, right = _compare_records(Path(path), set() if copy is None else _checksums(copy))
    except Exception as error:
        raise CheckpointError(_cause(path, error)) from error
    if wrong and right:
        raise CheckpointError(
            f"{os.fspath(path)} is corrupt: the stored checksum does not match in {len(wrong)} "
            f"record(s), first {wrong[0]}. Copy or download the file again."
        )


def save_file(obj: Any, path: StrPath) -> None:
    """Write `obj` with torch.save in one step: readers see the old file or the complete new one."""
    with atomic_path(path) as temporary:
        write_torch(obj, temporary)


def write_torch(obj: Any, temporary: Path) -> None:
    """Write `obj` with torch.save to a path that `atomic_path` gave."""
    with open(temporary, "wb") as stream:
        torch.save(obj, stream)  # a stream keeps the temporary name out of the file's bytes


def _is_zip(path: StrPath) -> bool:
    with open(path, "rb") as stream:
        return stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def _checksums(path: StrPath) -> set[tuple[int, int]]:
    with zipfile.ZipFile(path) as archive:
        return {(info.CRC, info.file_size) for info in archive.infolist()}


def _compare_records(path: Path, known: set[tuple[int, int]]) -> tuple[list[str], int]:
    """(names of records that differ from their checksum, number of records that do not)."""
    wrong: list[str] = []
    right = 0
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.file_size:
                continue
            if (info.CRC, info.file_size) in known or _record_is_whole(archive, info):
                right += 1
            else:
                wrong.append(info.filename)
    return wrong, right


def _record_is_whole(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(info) as record:
            while record.read(CHUNK_BYTES):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def _cause(path: StrPath, error: Exception) -> str:
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)|reduce for unrecognized function (.+)", text)
    if refused:
        name = refused.group(1) or refused.group(2)
        return (
            f"{os.fspath(path)} is refused: it asks to run or build {name}, which no weight file "
            "needs. Nothing of it was run. Get the file from a source you know, or have its owner "
            "save plain tensors, numbers, strings, lists and dictionaries."
        )
    detail = text.rsplit("WeightsUnpickler error:", maxsplit=1)[-1].strip().splitlines()
    cause = detail[0].strip() if detail else ""
    size = Path(path).stat().st_size
    return (
        f"{os.fspath(path)} is truncated or corrupt, or not a torch file ({size} bytes; "
        f"{type(error).__name__}{': ' + cause if cause else ''}). Copy or download it again."
    )
