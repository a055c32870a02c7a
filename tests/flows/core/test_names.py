"""Names from outside never decide where a file is written."""

from __future__ import annotations

import io
import os
import tarfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.core import names as names_module
from flows.core.files import write_json
from flows.core.names import UnsafeNameError, check_names, inside, local_names
from flows.storage.packs import FORMAT, unpack
from rfdetr.errors import DatasetError
from rfdetr.files import sha256_file

PARTS = st.sampled_from(
    ["a", "A", "b.jpg", "B.JPG", "..", ".", "", "C:", "c:x", "\\", "..\\..", "\x00", "é", "e\u0301"]
)
NAMES = st.lists(PARTS | st.text(max_size=5), min_size=1, max_size=5).map("/".join) | st.text()
UNSAFE = ["../x", "a/../../x", "/etc/x", "a//x", "C:\\x", "c:/x", "a\\..\\x", "a\x00b", ".", "x/"]


@given(st.lists(NAMES, max_size=12))
@settings(max_examples=100, deadline=None)
def test_every_name_gets_a_file_of_its_own_inside(names: list[str]) -> None:
    found = local_names({name: name for name in names})
    assert set(found) == set(names)
    paths = [unicodedata.normalize("NFC", path.casefold()) for path in found.values()]
    assert len(set(paths)) == len(paths)
    for path in found.values():
        parts = path.split("/")
        assert not {"", ".", ".."} & set(parts)
        assert not set(path) & {"\\", "\x00"}
        assert parts[0][1:2] != ":"
        assert all(len(os.fsencode(part)) < 240 for part in parts)
        assert not any(other.startswith(f"{path}/") for other in found.values())


@given(NAMES)
@settings(max_examples=60, deadline=None)
def test_a_checked_name_is_a_plain_path(name: str) -> None:
    folder = Path("/tmp")
    try:
        check_names([name], folder, "s3://bucket/set")
    except UnsafeNameError:
        assert local_names({name: name})[name] != name
    else:
        assert (folder / name).resolve() == folder.resolve() / name
        assert local_names({name: name})[name] == name


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_name_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeNameError, match="not a plain relative path") as caught:
        check_names(["fine.jpg", name], tmp_path, "s3://bucket/set")
    assert repr(name) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_ordinary_names_are_kept(tmp_path: Path) -> None:
    ordinary = [
        "a b.jpg",
        "ü/é.png",
        "100%.jpg",
        "a+b=c.jpg",
        "12:30.jpg",
        ".hidden",
        "A.jpg",
        "x.y",
    ]
    check_names(ordinary, tmp_path, "s3://bucket/set")
    assert local_names({name: name for name in ordinary}) == {name: name for name in ordinary}


def test_files_that_would_be_one_file_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_names(["a.jpg", "A.jpg"], tmp_path, "s3://bucket/set")  # two files on this system
    with pytest.raises(UnsafeNameError, match=r"'clash/a' would be a file and also the folder"):
        check_names(["clash/a", "clash/a/b"], tmp_path, "s3://bucket/set")
    monkeypatch.setattr(names_module, "_ignores_case", lambda _: True)
    with pytest.raises(UnsafeNameError, match=r"'a.jpg' and 'A.jpg' would be the same file"):
        check_names(["a.jpg", "A.jpg"], tmp_path, "s3://bucket/set")


def test_a_link_cannot_lead_out(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/link").symlink_to(tmp_path)
    assert inside(tmp_path / "set", "a/b.txt") == tmp_path / "set/a/b.txt"
    with pytest.raises(UnsafeNameError, match="leads out of"):
        inside(tmp_path / "set", "link/out.txt")


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//x", "C:\\x"])
def test_a_pack_with_an_unsafe_name_is_refused(tmp_path: Path, name: str) -> None:
    shard = tmp_path / "pack/shard-00000.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    facts = {"sha256": sha256_file(shard), "files": 1}
    index = {"format": FORMAT, "files": 1, "shards": {shard.name: facts}}
    write_json(shard.with_name("pack.json"), index)
    with pytest.raises(DatasetError, match="not a plain relative path"):
        unpack(shard.parent, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]
