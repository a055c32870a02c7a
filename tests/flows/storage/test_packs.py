"""Packed datasets: equal content back, small changes touch few shards, damage is found."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from flows.core.digest import path_digest
from flows.core.files import read_json, write_json
from flows.storage import packs as pack_module
from flows.storage.packs import open_dataset, pack, unpack
from rfdetr.errors import DatasetError
from rfdetr.files import sha256_file


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pack_module, "SHARD_BYTES", 20_000)
    folder = tmp_path / "set"
    for number in range(300):
        path = folder / ("train" if number % 3 else "valid") / f"bild {number} ü.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(1000))
    return folder


def shards(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.glob("shard-*.tar")}


def test_content_comes_back_equal_and_packs_are_reproducible(source: Path, tmp_path: Path) -> None:
    packed = pack(source, tmp_path / "packed", progress=False)
    assert len(shards(packed)) == 16
    assert shards(pack(source, tmp_path / "again", progress=False)) == shards(packed)
    unpack(packed, tmp_path / "back", progress=False)
    assert path_digest(tmp_path / "back") == path_digest(source)


def test_a_small_change_rewrites_few_shards(source: Path, tmp_path: Path) -> None:
    packed = pack(source, tmp_path / "packed", progress=False)
    before = shards(packed)
    (source / "train" / "new.jpg").write_bytes(b"new")
    (source / "valid" / "bild 0 ü.jpg").unlink()
    after = shards(pack(source, packed, progress=False))
    assert 1 <= sum(after[name] != before[name] for name in before) <= 2
    unpack(packed, tmp_path / "back", progress=False)
    assert path_digest(tmp_path / "back") == path_digest(source)


def test_an_unchanged_shard_keeps_its_hard_link(source: Path, tmp_path: Path) -> None:
    packed = pack(source, tmp_path / "packed", progress=False)
    links = {shard: shard.with_suffix(".cached") for shard in packed.glob("shard-*.tar")}
    for shard, cached in links.items():
        cached.hardlink_to(shard)
    pack(source, packed, progress=False)
    assert all(shard.samefile(cached) for shard, cached in links.items())


def test_a_damaged_shard_is_refused_and_nothing_appears(source: Path, tmp_path: Path) -> None:
    packed = pack(source, tmp_path / "packed", progress=False)
    shard = next(iter(sorted(packed.glob("shard-*.tar"))))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(DatasetError, match="damaged"):
        unpack(packed, tmp_path / "back", progress=False)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("kind", ["outside", "link"])
def test_a_hostile_archive_writes_nothing_outside(tmp_path: Path, kind: str) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "shard-00000.tar", "w") as archive:
        entry = tarfile.TarInfo("../evil.txt" if kind == "outside" else "link")
        if kind == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(entry, io.BytesIO(b""))
    digest = sha256_file(packed / "shard-00000.tar")
    index = {"format": "rfdetr-pack-1", "shards": {"shard-00000.tar": {"sha256": digest}}}
    write_json(packed / "pack.json", index)
    with pytest.raises(DatasetError, match="refused"):
        unpack(packed, tmp_path / "deep" / "back", progress=False)
    assert not (tmp_path / "deep" / "evil.txt").exists()
    assert not (tmp_path / "deep" / "back").exists()


def test_stages_read_a_pack_through_one_shared_copy(source: Path, tmp_path: Path) -> None:
    packed = pack(source, tmp_path / "packed", progress=False)
    state = tmp_path / "state"
    assert open_dataset(source, state) == source
    copy = open_dataset(packed, state)
    assert path_digest(copy) == path_digest(source)
    assert open_dataset(packed, state) == copy
    assert read_json(packed / "pack.json")["files"] == 300


def test_a_folder_that_is_not_a_pack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    with pytest.raises(DatasetError, match="is not a pack"):
        unpack(tmp_path / "full", tmp_path / "b", progress=False)
    with pytest.raises(DatasetError, match="not empty and not a pack"):
        pack(tmp_path / "full", tmp_path / "full", progress=False)
    with pytest.raises(DatasetError, match="not a folder with files"):
        pack(tmp_path / "none", tmp_path / "b", progress=False)


def test_the_command_packs_and_unpacks(source: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flows.cli.main", "pack", *arguments],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[3],
        )

    packed, back = str(tmp_path / "packed"), str(tmp_path / "back")
    done = command(str(source), packed)
    assert (done.returncode, done.stdout) == (0, f"{packed}\n"), done.stderr
    assert command("--unpack", back, packed).returncode == 0
    assert path_digest(back) == path_digest(source)
    failed = command(str(tmp_path / "none"), packed)
    assert failed.returncode == 1
    assert failed.stderr == f"error: {tmp_path / 'none'} is not a folder with files in it.\n"
    assert command(packed).returncode == 2
    assert "FOLDER PACK" in command("--help").stdout
