"""Reads and writes torch files (`.pth`, `.ckpt`) without ever running code from them.

Such a file is a pickle. Every read goes through torch's restricted unpickler (`weights_only=True`)
and a closed allow-list: what other libraries registered with torch is refused here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import pickle
import re
import threading
import types
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
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
# The classes that a file may contain beside torch's own: full name in the pickle -> class here.
_ALLOWED: dict[str, type] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": types.SimpleNamespace,
    **{
        f"{module}.{name}": cls
        for module in ("pathlib", "pathlib._local")  # Python 3.13 pickles the second name
        for name, cls in _PATH_CLASSES.items()
    },
}
# What torch itself allows: tensors, storages, types and plain containers. Another library may have
# registered these too, which does not make them foreign.
_TORCH_DEFAULT = re.compile(
    r"torch\.(\w*Tensor|Size|device|bool|[a-z]+\d+\w*|([a-z]+\.)?\w+Storage)"
    r"|torch\._utils\._rebuild_\w+|torch\._tensor\._rebuild_from_type_v2"
    r"|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
    r"|collections\.(OrderedDict|Counter)|builtins\.(set|bytearray|complex)|_codecs\.encode"
)
# The pickle instruction that names a class or function: "c", module, line feed, name, line feed.
_GLOBAL = re.compile(rb"(?=c([\w.<>\x80-\xff]{1,200})\n([\w.<>\x80-\xff]{1,200})\n)")
_registering = threading.Lock()


def load_file(path: StrPath, *, mmap: bool = False, verify: bool = True) -> Any:
    """Read a torch file onto the CPU with `weights_only=True` and the closed allow-list.

    `mmap=True` maps the tensors instead of copying them (zip format only; the older format is read
    in full). `verify=False` leaves `verify_file` to the caller. Raises FileNotFoundError for a
    missing file and CheckpointError, naming the file and the cause, for a folder, a damaged file
    or one that contains anything outside the allow-list. Does not disturb a torch.load that runs
    in another thread.
    """
    if Path(path).is_dir():
        raise CheckpointError(
            f"{os.fspath(path)} is a folder; name a checkpoint file. {_checkpoints_in(Path(path))}"
        )
    if not Path(path).exists():
        folder = Path(path).absolute().parent
        raise FileNotFoundError(f"No checkpoint {os.fspath(path)}. {_checkpoints_in(folder)}")
    is_zip = _is_zip(path)
    if verify:
        verify_file(path)
    try:
        with _allowed_classes(_named_globals(path, is_zip=is_zip)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except Exception as error:
        raise CheckpointError(_cause(path, error)) from error


def _checkpoints_in(folder: Path) -> str:
    """A sentence with the names of the checkpoints in `folder`."""
    if not folder.is_dir():
        return f"There is no folder {folder}."
    inside = sorted(p.name for p in folder.iterdir() if p.suffix in CHECKPOINT_SUFFIXES)
    return f"Found in {folder}: {', '.join(inside) or 'no checkpoint'}."


def verify_file(path: StrPath, copy: StrPath | None = None) -> None:
    """Compare every record of a zip file with its stored CRC-32, which torch does not do.

    `copy` is a file that was written from this one: records whose checksum was computed there are
    not read again. Raises CheckpointError. The older format has no checksums and passes, as does a
    file in which no checksum matches: it was written without them (a torch option).
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
    """Write `obj` with torch.save to a path from `atomic_path`."""
    with open(temporary, "wb") as stream:
        torch.save(obj, stream)  # a stream keeps the temporary name out of the file's bytes


def _named_globals(path: StrPath, *, is_zip: bool) -> set[str]:
    """Full names of everything that the pickle in a file could import, found without unpickling.

    Scans the bytes for the instruction, so text that looks like one is included as well.
    """
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            pickles = [i for i in archive.infolist() if i.filename.lower().endswith("data.pkl")]
            for info in pickles:
                del info.CRC  # compared by `verify_file`; wrong in files written without checksums
            content = b"".join(map(archive.read, pickles))
    else:
        content = Path(path).read_bytes()
    found = set(_GLOBAL.findall(content))
    return {_python3_name(*(part.decode(errors="replace") for part in pair)) for pair in found}


def _python3_name(module: str, name: str) -> str:
    """torch.save writes pickle protocol 2, which uses the module names of Python 2."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


@contextlib.contextmanager
def _allowed_classes(names: set[str]) -> Iterator[None]:
    """Allow those of `names` that are in our list; refuse those that only others registered.

    torch has one list of safe classes for all threads. Entries of other libraries stay in it, so
    that a torch.load in another thread is not disturbed; ours are added only while they are needed.
    """
    for name in sorted(names & _registered_names() - _ALLOWED.keys()):
        if not _TORCH_DEFAULT.fullmatch(name):
            raise pickle.UnpicklingError(f"GLOBAL {name} was registered by another library")
    needed = names & _ALLOWED.keys()
    if not needed:
        yield
        return
    with _registering:
        missing = needed - _registered_names()
        with serialization.safe_globals([(_ALLOWED[name], name) for name in missing]):
            yield


def _registered_names() -> set[str]:
    return {
        entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"
        for entry in serialization.get_safe_globals()
    }


def _is_zip(path: StrPath) -> bool:
    with open(path, "rb") as stream:
        return stream.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def _checksums(path: StrPath) -> set[tuple[int, int]]:
    with zipfile.ZipFile(path) as archive:
        return {(info.CRC, info.file_size) for info in archive.infolist()}


def _compare_records(path: Path, known: set[tuple[int, int]]) -> tuple[list[str], int]:
    """(names of records that do not match their checksum, number of records that do)."""
    wrong: list[str] = []
    right = 0
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.file_size:
                continue
            if (info.CRC, info.file_size) in known or _record_is_intact(archive, info):
                right += 1
            else:
                wrong.append(info.filename)
    return wrong, right


def _record_is_intact(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
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
            f"{os.fspath(path)} is refused: it contains {name}, which is not allowed in a weight "
            "file. Nothing was executed. Get the file from a source you trust, or ask its owner to "
            "save plain tensors, numbers, strings, lists and dictionaries."
        )
    detail = text.rsplit("WeightsUnpickler error:", maxsplit=1)[-1].strip().splitlines()
    cause = detail[0].strip() if detail else ""
    size = Path(path).stat().st_size
    return (
        f"{os.fspath(path)} is truncated or corrupt, or not a torch file ({size} bytes; "
        f"{type(error).__name__}{': ' + cause if cause else ''}). Copy or download it again."
    )
