"""Datasets of many small files as a few tar shards, which DVC hashes, pushes and pulls in seconds.

`rfdetr-pipeline pack FOLDER PACK` packs; with `--unpack` it restores FOLDER. The shard of a file
depends on its name only, so adding or changing files rewrites only their shards. Shards are plain
tar files with fixed timestamps and owners: equal content gives equal bytes.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flows.core.digest import digest_of, list_files
from flows.core.files import read_json, write_json
from flows.core.locks import locked
from flows.core.names import UnsafeNameError, check_names
from rfdetr.errors import DatasetError
from rfdetr.files import new_folder, sha256_file, to_disk

INDEX = "pack.json"
FORMAT = "rfdetr-pack-1"
SHARD_BYTES = 64 << 20


def pack(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, progress: bool = True
) -> Path:
    """Write the files of `source` as shards into the folder `target`; the source is not changed.

    If `target` contains an older pack, only the shards that differ are replaced. Raises
    DatasetError.
    """
    root, out = Path(source), Path(target)
    files = list(list_files(root)) if root.is_dir() else []
    if not files:
        raise DatasetError(f"{root} is not a folder with files in it.")
    if out.exists() and any(out.iterdir()) and not is_packed(out):
        raise DatasetError(f"{out} is not empty and not a pack; choose another folder.")
    old = read_json(out / INDEX)["shards"] if is_packed(out) else {}
    count = _shard_count(sum(status.st_size for _, status in files), len(old))
    out.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[str]] = {f"shard-{n:05d}.tar": [] for n in range(count)}
    for name, _ in files:
        groups[f"shard-{zlib.crc32(name.encode()) % count:05d}.tar"].append(name)
    shards = {
        shard: _write_shard(root, out / shard, names, old.get(shard))
        for shard, names in tqdm(groups.items(), unit="shard", disable=not progress)
        if names
    }
    write_json(out / INDEX, {"format": FORMAT, "files": len(files), "shards": shards})
    for path in out.glob("shard-*.tar"):
        if path.name not in shards:
            path.unlink()
    return out


def _shard_count(size: int, old: int) -> int:
    """A power of two; an existing pack keeps its count while it is within a factor of 4."""
    wanted = 1
    while wanted * SHARD_BYTES < size:
        wanted *= 2
    previous = 1 << max(0, old - 1).bit_length()
    return previous if old and wanted / 4 < previous < wanted * 4 else wanted


def _write_shard(
    root: Path, target: Path, names: list[str], old: dict[str, Any] | None
) -> dict[str, Any]:
    """Write one shard; one of equal content stays in place, with the hard link that DVC made."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        shard = Path(folder) / target.name
        with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as archive:
            for name in names:
                entry = tarfile.TarInfo(name)
                content = (root / name).read_bytes()
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
        digest = sha256_file(shard)
        if not (old and old["sha256"] == digest and target.exists()):
            to_disk(shard)
            shard.replace(target)
    return {"sha256": digest, "files": len(names)}


def is_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder contains a pack."""
    return (Path(folder) / INDEX).is_file()


def unpack(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, progress: bool = True
) -> Path:
    """Write the files of a pack into the new folder `target`; every shard's SHA-256 is checked.

    The folder appears only when it is complete. Raises DatasetError if the pack is damaged.
    """
    packed, out = Path(source), Path(target)
    index = read_json(packed / INDEX) if is_packed(packed) else {}
    if index.get("format") != FORMAT:
        raise DatasetError(f"{packed} is not a pack ({INDEX} of format {FORMAT} is missing).")
    if out.exists():
        raise DatasetError(f"{out} exists already; remove it or choose another folder.")
    with new_folder(out) as work:
        for name, facts in tqdm(index["shards"].items(), unit="shard", disable=not progress):
            _unpack_shard(packed / name, facts["sha256"], work)
    return out


def _unpack_shard(shard: Path, sha256: str, target: Path) -> None:
    if not shard.exists() or sha256_file(shard) != sha256:
        raise DatasetError(f"{shard} is missing or damaged; fetch the pack again (dvc pull).")
    try:
        with tarfile.open(shard) as archive:
            entries = list(_regular_files(archive, shard))
            check_names([entry.name for entry in entries], target, str(shard))
            archive.extractall(target, members=entries, filter="data")
    except (tarfile.TarError, UnsafeNameError) as error:
        raise DatasetError(f"{shard} is refused: {error}") from error


def _regular_files(archive: tarfile.TarFile, shard: Path) -> Iterator[tarfile.TarInfo]:
    for entry in archive:
        if not entry.isfile():
            raise DatasetError(f"{shard}: '{entry.name}' is not a regular file; refused.")
        yield entry


def open_dataset(folder: str | os.PathLike[str], state_dir: Path) -> Path:
    """The folder to read images from: `folder`, or the unpacked copy if `folder` is a pack.

    Copies are in `<state_dir>/unpacked/<digest>`, shared by all stages and projects.
    """
    if not is_packed(folder):
        return Path(folder)
    name = digest_of(read_json(Path(folder) / INDEX)["shards"])[:24]
    target = state_dir / "unpacked" / name
    if not target.exists():
        with locked(state_dir / "unpacked" / f".{name}.lock", wait=True):
            if not target.exists():
                unpack(folder, target)
    os.utime(target)  # doctor removes copies that have not been used for a month
    return target
