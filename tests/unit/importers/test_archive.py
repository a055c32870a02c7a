"""Zip files: what is in them arrives, and nothing outside of the folder is ever written."""

from __future__ import annotations

import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rfdetr.errors import DatasetError
from rfdetr.importers import archive, import_dataset, opened_source
from tests.datasets import make_roboflow


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def zipped(folder: Path, target: Path, *, below: str = "") -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            packed.write(path, below + path.relative_to(folder).as_posix())
        packed.writestr("__MACOSX/._a.json", b"x")
    return target


@pytest.mark.parametrize("below", ["", "my export/"])
def test_a_zip_is_imported_as_its_folder(below: str, tmp_path: Path) -> None:
    source = make_roboflow(tmp_path / "set", splits={"train": 4, "valid": 2})
    packed = zipped(source, tmp_path / "trees.v3i.coco.zip", below=below)
    reports = [
        import_dataset(given, tmp_path / f"out {number}", progress=False)
        for number, given in enumerate((source, packed))
    ]
    assert reports[0].images == reports[1].images == {"train": 4, "val": 2}
    assert contents(tmp_path / "out 0") == contents(tmp_path / "out 1")
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def one(folder: Path, name: str, content: bytes = b"x", mode: int = 0, flags: int = 0) -> Path:
    target = folder / "a.zip"
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(entry, content, zipfile.ZIP_DEFLATED)
    if flags:
        data = bytearray(target.read_bytes())
        for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
            struct.pack_into("<H", data, data.index(mark) + offset, flags)
        target.write_bytes(data)
    return target


BAD: dict[str, Callable[[Path], Path]] = {
    "leads out": lambda folder: one(folder, "../../outside"),
    "leads out of": lambda folder: one(folder, "a/../../b"),
    "leads out of it": lambda folder: one(folder, "..\\outside"),
    "'/tmp/outside' leads": lambda folder: one(folder, "/tmp/outside"),
    "'C:/outside' leads": lambda folder: one(folder, "C:\\outside"),
    "is a link": lambda folder: one(folder, "a.jpg", b"/etc/passwd", stat.S_IFLNK | 0o777),
    "encrypted": lambda folder: one(folder, "a.jpg", flags=1),
    "If you trust it": lambda folder: one(folder, "zeros", bytes(8 << 20)),
    "damaged": lambda folder: cut(one(folder, "a.jpg", bytes(1000))),
    "is damaged": lambda folder: cut(one(folder, "a.jpg"), keep=0),
}


def cut(path: Path, keep: int = -30) -> Path:
    path.write_bytes(path.read_bytes()[:keep])
    return path


@pytest.mark.parametrize("said", BAD)
def test_what_is_not_safe_is_refused_in_one_sentence(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "UNSUSPICIOUS", 1 << 20)
    (tmp_path / "given").mkdir()
    packed = BAD[said](tmp_path / "given")
    with pytest.raises(DatasetError) as raised, opened_source(packed, tmp_path / "work/out"):
        pass
    assert said in str(raised.value) and str(packed) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p != packed]


def test_damaged_bytes_never_escape_as_another_error(tmp_path: Path) -> None:
    packed = zipped(
        make_roboflow(tmp_path / "set", splits={"train": 1, "valid": 1}), tmp_path / "z"
    )
    intact, draw = packed.read_bytes(), np.random.default_rng(0)
    for number in range(100):
        data = bytearray(intact)
        tail = number % 2 * (len(data) - 600)  # the directory at the end, or anywhere
        for at in draw.integers(tail, len(data), 3):
            data[at] = draw.integers(256)
        packed = tmp_path / "damaged.zip"
        packed.write_bytes(data)
        try:
            with opened_source(packed, tmp_path / "work/out"):
                pass
        except DatasetError as error:
            assert str(packed) in str(error)
    assert {p.name for p in tmp_path.iterdir()} == {"set", "z", "damaged.zip", "work"}
    assert list((tmp_path / "work").iterdir()) == []


def test_names_without_an_encoding_are_utf8(tmp_path: Path) -> None:
    name = "Bäume 树.jpg"
    packed = one(tmp_path, "Bxxume yyy.jpg")
    data = packed.read_bytes().replace(b"Bxxume yyy.jpg", name.encode())
    packed.write_bytes(data)
    with opened_source(packed, tmp_path / "out") as folder:
        assert [path.name for path in folder.iterdir()] == [name]


def test_backslashes_of_windows_are_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("set\\train\\", b"")
        packed.writestr("set\\train\\a.jpg", b"x")
        packed.writestr("set\\12:30.txt", b"x")
    with opened_source(tmp_path / "a.zip", tmp_path / "out") as folder:
        assert contents(folder) == {"train/a.jpg": b"x", "12:30.txt": b"x"}


def test_other_archives_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(DatasetError, match="unpack this archive first"):
        import_dataset(tmp_path / "a.tar.gz", tmp_path / "out")


def test_an_archive_in_an_archive_is_named(tmp_path: Path) -> None:
    packed = one(tmp_path, "trees.zip")
    with pytest.raises(DatasetError, match=r"a\.zip: it contains only archives \(trees\.zip\)"):
        import_dataset(packed, tmp_path / "out", progress=False)
