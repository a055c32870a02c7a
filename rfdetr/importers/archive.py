"""A dataset in a zip file, unpacked for as long as it is read."""

from __future__ import annotations

import contextlib
import lzma
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath

from rfdetr.errors import DatasetError
from rfdetr.files import scratch_folder

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
LARGEST_RATIO = 100  # of an archive that unpacks to more than UNSUSPICIOUS bytes
UNSUSPICIOUS = 1 << 30
DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, NotImplementedError, ValueError),
)
MOST_ENTRIES = 5_000_000


@contextlib.contextmanager
def opened_source(source: Path, target: Path) -> Iterator[Path]:
    """The folder that holds everything in `source`, which is a folder or a zip file.

    A zip file is unpacked beside `target`, and the copy is removed at the end. Raises DatasetError,
    whose text names the archive.
    """
    source = source.expanduser().absolute()
    named = source.suffix.lower() == ".zip"
    if not (source.is_file() and (named or zipfile.is_zipfile(source))):
        yield only_folder(source)
        return
    with scratch_folder(target) as work:
        try:
            unpack(source, work)
            yield only_folder(work)
        except DatasetError as error:
            raise DatasetError(str(error).replace(str(work), str(source))) from error


def only_folder(root: Path) -> Path:
    """The folder that holds everything: exports often put all into one subfolder."""
    root = root.expanduser().absolute()
    if not root.is_dir():
        if root.is_file() and root.suffix.lower() in ARCHIVES:
            raise DatasetError(f"{root}: unpack this archive first, and name the folder.")
        kind = "is a file" if root.exists() else "does not exist"
        raise DatasetError(f"{root} {kind}; name the folder of the export, or its zip file.")
    while True:
        inside = [p for p in root.iterdir() if not p.name.startswith((".", "__MACOSX"))]
        if len(inside) != 1 or not inside[0].is_dir():
            return root
        root = inside[0]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip file into an empty folder; never writes outside of it.

    Raises DatasetError for names that lead out of the folder, links, encrypted or damaged archives,
    and for more than the disk or a reasonable ratio allows.
    """
    try:
        with _open(archive) as opened:
            named = {_name(entry): entry for entry in opened.infolist()}
            entries = {name: entry for name, entry in named.items() if not name.endswith("/")}
            _require_safe(archive, entries)
            _require_room(archive, entries.values(), folder)
            for name, entry in entries.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                with opened.open(entry) as stream, open(folder / name, "wb") as written:
                    shutil.copyfileobj(stream, written, 1 << 20)
    except DAMAGED as error:
        raise DatasetError(
            f"{archive} is damaged or not an ordinary zip file ({error}); download it again, or "
            "unpack it and name the folder."
        ) from error
    except OSError as error:
        raise DatasetError(f"{archive} cannot be unpacked: {error}.") from error


def _open(archive: Path) -> zipfile.ZipFile:
    """The archive; names without an encoding are UTF-8 if they can be."""
    try:
        return zipfile.ZipFile(archive, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        return zipfile.ZipFile(archive)


def _name(entry: zipfile.ZipInfo) -> str:
    """The path of an entry; some tools of Windows write backslashes."""
    return entry.filename.replace("\\", "/")


def _require_safe(archive: Path, entries: Mapping[str, zipfile.ZipInfo]) -> None:
    for name, entry in entries.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
            problem = f"the name {name!r} leads out of it"
        elif stat.S_ISLNK(entry.external_attr >> 16):
            problem = f"{name} is a link; archive the file itself"
        elif entry.flag_bits & 1:
            problem = f"{name} is encrypted; unpack it yourself and name the folder"
        else:
            continue
        raise DatasetError(f"{archive} is not unpacked: {problem}.")


def _require_room(archive: Path, entries: Collection[zipfile.ZipInfo], folder: Path) -> None:
    """Raise DatasetError for too much. An entry never gives more bytes than it states."""
    total, packed = sum(entry.file_size for entry in entries), archive.stat().st_size
    free = shutil.disk_usage(folder).free
    if len(entries) > MOST_ENTRIES or total > max(UNSUSPICIOUS, LARGEST_RATIO * packed):
        raise DatasetError(
            f"{archive} is not unpacked: {len(entries):,} files with {total / 1e9:.1f} GB from "
            f"{packed / 1e6:.1f} MB. If you trust it, unpack it yourself and name the folder."
        )
    if total > free:
        raise DatasetError(
            f"{archive} needs {total / 1e9:.1f} GB, and {os.fspath(folder.parent)} has "
            f"{free / 1e9:.1f} GB free."
        )
