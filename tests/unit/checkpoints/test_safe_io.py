"""The safe reader: what it takes, what it refuses, and that refused files run nothing."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import fractions
import pathlib
import pickle
import random
import sys
import threading
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rfdetr.checkpoints.safe_io import load_file, save_file
from rfdetr.errors import CheckpointError

EVIL = ("evil_reduce_in_args.pth", "evil_reduce_inside_namespace.pth")


class _Call:
    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call  # type: ignore[return-value]


@pytest.fixture
def empty_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", EVIL)
def test_malicious_fixtures_are_refused_and_run_nothing(
    parity: Path, empty_tmp: Path, name: str, mmap: bool
) -> None:
    with pytest.raises(CheckpointError, match=r"evil_.*refused.*eval"):
        load_file(parity / "training" / "checkpoints" / name, mmap=mmap)
    assert not list(empty_tmp.iterdir())


@pytest.mark.parametrize("zip_container", [True, False])
@pytest.mark.parametrize("place", ["model", "args", "key"])
def test_calls_anywhere_in_the_file_are_refused(
    tmp_path: Path, place: str, zip_container: bool
) -> None:
    target = tmp_path / "touched"
    call = _Call(pathlib.Path.touch, target)
    content = {
        "model": {"model": {"a": call}},
        "args": {"model": {"a": torch.ones(1)}, "args": argparse.Namespace(x=[call])},
        "key": {"model": {call: torch.ones(1)}},
    }[place]
    file = tmp_path / "evil.pth"
    torch.save(content, file, _use_new_zipfile_serialization=zip_container)
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        load_file(file)
    assert not target.exists()


def test_globals_registered_elsewhere_do_not_widen_the_list(tmp_path: Path) -> None:
    file = tmp_path / "counter.pth"
    torch.save({"x": _Call(fractions.Fraction, 1, 2)}, file)
    with torch.serialization.safe_globals([fractions.Fraction]):
        with pytest.raises(CheckpointError, match="Fraction"):
            load_file(file)
        assert fractions.Fraction in torch.serialization.get_safe_globals()
    before = set(torch.serialization.get_safe_globals())
    load_file(_saved(tmp_path, argparse.Namespace(a=1)))
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("zip_container", [True, False])
def test_python_2_names_of_registered_functions_are_refused(
    tmp_path: Path, zip_container: bool
) -> None:
    """Pickle protocol 2 writes `__builtin__` for `builtins`."""
    file, target = tmp_path / "evil.pth", tmp_path / "touched"
    content = {"x": _Call(eval, f"__import__('pathlib').Path({str(target)!r}).touch()")}
    torch.save(content, file, _use_new_zipfile_serialization=zip_container)
    registered = torch.serialization.safe_globals([(eval, "builtins.eval")])
    with registered, pytest.raises(CheckpointError, match=r"evil\.pth is refused.*eval"):
        load_file(file)
    assert not target.exists()


@pytest.fixture
def frequent_thread_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("frequent_thread_switches")
def test_loads_in_other_threads_are_not_disturbed(tmp_path: Path) -> None:
    """torch keeps one list of safe classes for all threads; ours needs additions to it."""
    ours, theirs = tmp_path / "ours.pth", tmp_path / "theirs.pth"
    save_file({"args": argparse.Namespace(path=tmp_path)}, ours)
    torch.save({"x": _Call(fractions.Fraction, 1, 2)}, theirs)
    stop, errors, loads = threading.Event(), [], 0

    def keep_loading() -> None:
        nonlocal loads
        while not stop.is_set():
            try:
                torch.load(theirs, weights_only=True)
                loads += 1
            except Exception as error:
                errors.append(error)

    with torch.serialization.safe_globals([fractions.Fraction]):
        before = set(torch.serialization.get_safe_globals())
        thread = threading.Thread(target=keep_loading)
        thread.start()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            read = list(pool.map(load_file, [ours] * 200))
        stop.set()
        thread.join()
        assert set(torch.serialization.get_safe_globals()) == before
    assert errors == []
    assert loads > 0
    assert all(content["args"].path == pathlib.PurePosixPath(tmp_path) for content in read)


def test_a_class_that_others_registered_stays_registered(tmp_path: Path) -> None:
    content = {"args": argparse.Namespace(a=1), "types": [torch.float32, torch.Size([1]), {1}]}
    file = _saved(
        tmp_path,
        content
        | {
            "model": collections.OrderedDict(a=torch.nn.Parameter(torch.ones(2))),
            "device": torch.device(0),
        },
    )
    registered = [argparse.Namespace, (pathlib.PurePath, "pathlib.PosixPath"), set, torch.device]
    registered += [torch.Size, torch.Tensor, torch.FloatStorage, collections.OrderedDict]
    registered += [torch.nn.Parameter, torch._utils._rebuild_tensor_v2]
    with torch.serialization.safe_globals(registered):
        load_file(file)
        assert torch.load(file, weights_only=True)["args"].a == 1


@pytest.mark.parametrize("size", [0, 1, 100, 5000, -1, -40, -400])
def test_truncated_files_name_the_file(tmp_path: Path, size: int) -> None:
    complete = _saved(tmp_path, {"model": {"a": torch.ones(3000)}}).read_bytes()
    file = tmp_path / "cut.pth"
    file.write_bytes(complete[:size])
    with pytest.raises(CheckpointError, match=r"cut\.pth is truncated or corrupt"):
        load_file(file)


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path: Path) -> None:
    file = _saved(tmp_path, {"model": {"a": torch.arange(9000.0), "b": torch.ones(10)}})
    with zipfile.ZipFile(file) as archive:
        offset = archive.getinfo("archive/data/0").header_offset
    damaged = bytearray(file.read_bytes())
    damaged[offset + 20_000] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"corrupt: the stored checksum.*data/0"):
        load_file(file, mmap=True)


def test_files_written_without_checksums_load(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        file = _saved(tmp_path, {"a": torch.arange(9.0)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_file(file)["a"].sum() == 36


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    complete = _saved(tmp_path, {"model": {"a": torch.ones(50)}, "args": argparse.Namespace(b=[1])})
    for seed in range(60):
        draw = random.Random(seed)
        damaged = bytearray(complete.read_bytes())
        for _ in range(4):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file = tmp_path / "damaged.pth"
        file.write_bytes(damaged)
        try:
            load_file(file, mmap=bool(seed % 2))
        except CheckpointError as error:
            assert "damaged.pth" in str(error)


@pytest.mark.parametrize("content", [b"not a torch file", pickle.dumps([1]), b"<html>404</html>"])
def test_other_files_are_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "page.pth"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"page\.pth"):
        load_file(file)


def test_a_missing_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "none.pth")


def test_paths_of_another_system_load_as_pure_paths(tmp_path: Path) -> None:
    content = {"args": types.SimpleNamespace(a=pathlib.PureWindowsPath("c:/x"), b=tmp_path)}
    args = load_file(_saved(tmp_path, content))["args"]
    assert isinstance(args.a, pathlib.PureWindowsPath)
    assert isinstance(args.b, pathlib.PurePosixPath)
    file = _saved(tmp_path, pathlib.PurePosixPath("/data"))
    renamed = tmp_path / "windows.pth"
    _replace_in_zip(file, renamed, b"pathlib\nPurePosixPath", b"pathlib\nWindowsPath")
    assert isinstance(load_file(renamed), pathlib.PureWindowsPath)
    _replace_in_zip(file, renamed, b"pathlib\nPurePosixPath", b"pathlib._local\nPosixPath")
    assert load_file(renamed) == pathlib.PurePosixPath("/data")


def test_saving_is_atomic_and_the_bytes_depend_on_the_content_only(tmp_path: Path) -> None:
    first, second = tmp_path / "a.pth", tmp_path / "sub" / "b.pth"
    save_file({"a": torch.ones(4)}, first)
    save_file({"a": torch.ones(4)}, second)
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_file({"a": lambda: 1}, first)
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "sub"]


def _saved(folder: Path, content: object) -> Path:
    file = folder / "saved.pth"
    save_file(content, file)
    return file


def _replace_in_zip(source: Path, target: Path, old: bytes, new: bytes) -> None:
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(target, "w") as write:
        for name in read.namelist():
            write.writestr(name, read.read(name).replace(old, new))
