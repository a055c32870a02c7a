"""Text files of people's datasets: UTF-8, or UTF-16 where a byte order mark says so."""

from __future__ import annotations

import codecs
import errno
import stat
from pathlib import Path

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
}


def read_text(path: Path) -> str:
    """The text of a file without its byte order mark.

    Raises OSError, and UnicodeError that says what the file is not and how to save it.
    """
    data = read_file(path)
    try:
        return data.decode("utf-16" if is_utf16(data) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnicodeError(not_utf8(data)) from error


def read_file(path: Path) -> bytes:
    """The content of a file. Raises OSError, also for a pipe, which would wait for a writer."""
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def is_packed(data: bytes) -> bool:
    """Whether the bytes are those of a compressed file."""
    return data.startswith(tuple(COMPRESSED))


def is_utf16(data: bytes) -> bool:
    """Whether the bytes start with a mark of UTF-16."""
    return data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def not_utf8(data: bytes) -> str:
    """What is wrong with text that cannot be decoded, with the remedy."""
    for start, name in COMPRESSED.items():
        if data.startswith(start):
            return f"not text but compressed by {name}. Unpack the file"
    found = "it looks like UTF-16"
    if not is_utf16(data) and b"\0" not in data[:4]:
        found = "it may be Latin-1 or Windows-1252"
        try:
            data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            found = f"byte 0x{data[error.start]:02x} in line {line}; {found}"
    return f"not UTF-8 text ({found}). Save the file as UTF-8"


def split_lines(text: str) -> list[str]:
    """Lines that end in LF, CR or both, as editors count them; form feeds and the like end none."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]
