"""Datasets of very many small files as a few tar shards, so that hashing, pushing and pulling cost
seconds instead of minutes.

`python -m flows.storage.packs FOLDER PACK` packs, `--unpack` writes the files of PACK into FOLDER. A file's
shard follows from its name alone: adding or changing some files rewrites their shards
only. Shards are plain tar files with fixed times and owners, equal for equal content.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flows.core.digest import digest_of, list_files
from flows.core.errors import explain
from flows.core.files import read_json, write_json
from flows.core.locks import locked
from rfdetr.errors import DatasetError
from rfdetr.files import atomic_path, sha256_file

INDEX = "pack.json"
FORMAT = "rfdetr-pack-1"
SHARD_BYTES = 64 << 20


def pack(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, progress: bool = True
) -> Path:
    """Write the files of `source` as shards into the folder `target`; the source is not touched.

    A target that holds an older pack is brought up to date. Raises DatasetError.
    """
    root, out = Path(source), Path(target)
    files = list(list_files(root)) if root.is_dir() else []
    if not files:
        raise DatasetError(f"{root} is no folder with files in it.")
    if out.exists() and any(out.iterdir()) and not is_packed(out):
        raise DatasetError(f"{out} is not empty and holds no pack; choose another folder.")
    old = read_json(out / INDEX)["shards"] if is_packed(out) else {}
    count = _shard_count(sum(status.st_size for _, status in files), len(old))
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
    """A power of two; an existing pack keeps its number until shards are off by four times."""
    wanted = 1
    while wanted * SHARD_BYTES < size:
        wanted *= 2
    previous = 1 << max(0, old - 1).bit_length()
    return previous if old and wanted / 4 < previous < wanted * 4 else wanted


def _write_shard(
    root: Path, target: Path, names: list[str], old: dict[str, Any] | None
) -> dict[str, Any]:
    with atomic_path(target) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive:
            for name in names:
                entry = tarfile.TarInfo(name)
                content = (root / name).read_bytes()
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
        digest = sha256_file(temporary)
        if old and old["sha256"] == digest and target.exists():
            shutil.copyfile(target, temporary)  # same content: keep what DVC has linked
    return {"sha256": digest, "files": len(names)}


def is_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds shards that `pack` wrote."""
    return (Path(folder) / INDEX).is_file()


def unpack(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, progress: bool = True
) -> Path:
    """Write the files of a pack into the new folder `target`, checked shard by shard.

    The folder appears only when it is complete. Raises DatasetError for a damaged pack.
    """
    packed, out = Path(source), Path(target)
    index = read_json(packed / INDEX) if is_packed(packed) else {}
    if index.get("format") != FORMAT:
        raise DatasetError(f"{packed} holds no pack ({INDEX} of format {FORMAT} is missing).")
    if out.exists():
        raise DatasetError(f"{out} exists already; remove it or choose another folder.")
    work = out.with_name(f".{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name, facts in tqdm(index["shards"].items(), unit="shard", disable=not progress):
        shard = packed / name
        if not shard.exists() or sha256_file(shard) != facts["sha256"]:
            raise DatasetError(f"{shard} is missing or damaged; fetch the pack again (dvc pull).")
        try:
            with tarfile.open(shard) as archive:
                archive.extractall(work, members=_plain_files(archive, shard), filter="data")
        except tarfile.TarError as error:
            raise DatasetError(f"{shard} is refused: {error}") from error
    work.replace(out)
    return out


def _plain_files(archive: tarfile.TarFile, shard: Path) -> Iterator[tarfile.TarInfo]:
    for entry in archive:
        if not entry.isfile():
            raise DatasetError(f"{shard}: '{entry.name}' is no plain file; refused.")
        yield entry


def open_dataset(folder: str | os.PathLike[str], state_dir: Path) -> Path:
    """The folder to read images from: `folder` itself, or the unpacked copy of a pack.

    Copies live in `<state dir>/unpacked/<content>` and are shared by all stages and runs.
    """
    if not is_packed(folder):
        return Path(folder)
    name = digest_of(read_json(Path(folder) / INDEX)["shards"])[:24]
    target = state_dir / "unpacked" / name
    if not target.exists():
        with locked(state_dir / "unpacked" / f".{name}.lock", wait=True):
            if not target.exists():
                unpack(folder, target)
    os.utime(target)  # `doctor` removes what has not been used for long
    return target


def main(arguments: list[str] | None = None) -> int:
    """Command line; status 1 after an error, which is one readable text."""
    parser = argparse.ArgumentParser(prog="python -m flows.storage.packs", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the small files")
    parser.add_argument("pack", type=Path, metavar="PACK", help="the folder of the shards")
    parser.add_argument("--unpack", action="store_true", help="from PACK to a new FOLDER")
    given = parser.parse_args(arguments)
    try:
        if given.unpack:
            print(unpack(given.pack, given.folder, progress=sys.stderr.isatty()))
        else:
            print(pack(given.folder, given.pack, progress=sys.stderr.isatty()))
    except Exception as error:  # noqa: BLE001 - one readable text
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
