"""Where files with names from outside (object keys, archive entries) are written.

Such a name may contain `..`, an absolute path, a drive letter or a backslash, or differ from
another one only by case. No file of the pipeline is named after it except through this module.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import unicodedata
from collections.abc import Collection, Mapping
from pathlib import Path

from rfdetr.errors import RFDETRError

MAX_PART = 200  # bytes; file systems allow 255, and temporary names are longer
MAX_NAME = 1000
# Backslash and colon separate folders and drives on Windows.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\]|^.:")


class UnsafeNameError(RFDETRError, ValueError):
    """A name that cannot be the path of a file inside a folder."""


def local_names(wanted: Mapping[str, str]) -> dict[str, str]:
    """Name -> relative POSIX path inside any folder; no two are the same file, on any system.

    `wanted` gives the preferred path of each name. It is kept if it is such a path, otherwise
    percent-encoded. If it is taken, perhaps in another case or as a folder, the file gets a folder
    of its own.
    """
    taken: set[str] = set()
    folders: set[str] = set()
    found: dict[str, str] = {}
    for name, preferred in wanted.items():
        path = _encoded(preferred)
        while not _is_free(_folded(path), taken, folders):
            path = f"~{_hash(name)[:8]}/{path}"
        taken.add(_folded(path))
        folders.update(_parents(_folded(path)))
        found[name] = path
    return found


def check_names(names: Collection[str], folder: Path, what: str) -> None:
    """Raise UnsafeNameError unless every name can be kept as a path inside the existing `folder`.

    `what` begins the message, for example with the address of a prefix.
    """
    fold = _folded if _ignores_case(folder) else str
    seen: dict[str, str] = {}
    for name in names:
        if _encoded(name) != name:
            raise UnsafeNameError(
                f"{what}: the name {name!r} is not a plain relative path, so the file could be "
                f"written outside of {folder}; refused. Rename it at the source."
            )
        other = seen.setdefault(fold(name), name)
        if other != name:
            raise UnsafeNameError(
                f"{what}: {other!r} and {name!r} would be the same file in {folder}, whose file "
                "system ignores case. Rename one at the source."
            )
    for name in names:
        file = next((p for p in _parents(fold(name)) if p in seen), None)
        if file is not None:
            raise UnsafeNameError(
                f"{what}: {seen[file]!r} would be a file and also the folder of {name!r}. Rename "
                "one at the source."
            )


def inside(folder: Path, name: str) -> Path:
    """The file of a checked name. Raises UnsafeNameError if a link in `folder` leads elsewhere."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise UnsafeNameError(f"the name {name!r} leads out of {folder}; refused.")
    return path


def _encoded(name: str) -> str:
    """`name` if it is a plain relative path, else a percent-encoded one."""
    path = "/".join(map(_encoded_part, name.split("/")))
    return path if _bytes(path) <= MAX_NAME else _shortened(path)


def _encoded_part(part: str) -> str:
    if part in ("", ".", ".."):
        return part.replace(".", "%2E") or "%"
    text = _UNSAFE.sub(lambda m: "".join(f"%{ord(c):02X}" for c in m.group()), part)
    return text if _bytes(text) <= MAX_PART else _shortened(text)


def _shortened(text: str) -> str:
    """A part of a path for a text that is too long: its end, after a hash of all of it."""
    end = text.replace("/", "_")[-40:]
    return f"{_hash(text)}_{end}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))


def _is_free(path: str, taken: set[str], folders: set[str]) -> bool:
    return not (path in taken or path in folders or any(p in taken for p in _parents(path)))


def _folded(path: str) -> str:
    """Equal for names that are the same file on some system: case, composed characters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _ignores_case(folder: Path) -> bool:
    """Whether names that differ by case are the same file in `folder`."""
    with tempfile.NamedTemporaryFile(prefix=".rfdetr-case-", dir=folder) as probe:
        path = Path(probe.name)
        return path.with_name(path.name.upper()).exists()
