"""Images to look at: files, folders and s3:// prefixes, listed at once and fetched when needed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.storage.objects import download
from flows.storage.s3 import Address, guard, is_s3, make_client
from rfdetr.data.decode import IMAGE_SUFFIXES
from rfdetr.errors import DatasetError


@dataclass(frozen=True)
class Picture:
    """One image. `name` tells it from the others, `stamp` changes with its content."""

    name: str
    place: str  # a file, or an s3:// address
    stamp: str
    modified: float  # seconds since 1970


def list_pictures(sources: Sequence[str], *, leave_out: Path | None = None) -> list[Picture]:
    """The images of files, folders and s3:// addresses, in order of source and name.

    Names are relative to their source. What lies below the folder `leave_out` is passed over.
    Raises DatasetError when a source does not exist, when there is no image, and when two images
    would have the same name.
    """
    found: dict[str, Picture] = {}
    for source in sources:
        for picture in _in_bucket(source) if is_s3(source) else _in_folder(source, leave_out):
            other = found.setdefault(picture.name, picture)
            if other.place != picture.place:
                raise DatasetError(
                    f"{other.place} and {picture.place} would both be called {picture.name}. "
                    "Give the folder above them as the one source, or start once for each."
                )
    if not found:
        raise DatasetError(
            f"No images in {', '.join(sources)}. Known: {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return list(found.values())


def newest(
    pictures: Sequence[Picture], *, hours: float | None = None, limit: int | None = None
) -> list[Picture]:
    """The images of the last `hours`, at most `limit`, newest first."""
    earliest = 0.0 if hours is None else time.time() - 3600 * hours
    recent = [picture for picture in pictures if picture.modified >= earliest]
    return sorted(recent, key=lambda p: (-p.modified, p.name))[:limit]


def fetch_picture(picture: Picture, target: Path, client: Any = None) -> Path:
    """The image as a file: itself, or its download to `target`. Raises StorageError."""
    if not is_s3(picture.place):
        return Path(picture.place)
    return download(picture.place, target, progress=False, client=client)


def _in_folder(source: str, leave_out: Path | None) -> Iterator[Picture]:
    base = Path(source)
    if base.is_file():
        yield _of_file(base, base.name)
    elif base.is_dir():
        for file in sorted(base.rglob("*")):
            inside = leave_out is not None and file.resolve().is_relative_to(leave_out.resolve())
            if file.suffix.lower() in IMAGE_SUFFIXES and not inside:
                yield _of_file(file, file.relative_to(base).as_posix())
    else:
        raise DatasetError(f"{source} does not exist.")


def _of_file(file: Path, name: str) -> Picture:
    status = file.stat()
    stamp = f"{status.st_size}-{status.st_mtime_ns}"
    return Picture(name, str(file), stamp, status.st_mtime)


def _in_bucket(source: str) -> Iterator[Picture]:
    address, client = Address.parse(source), make_client()
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=address.bucket, Prefix=address.key.rstrip("/")
    )
    found = guard(lambda: [o for page in pages for o in page.get("Contents", ())], str(address))
    folder = address.key.rstrip("/") + "/"
    for item in sorted(found, key=lambda item: str(item["Key"])):
        key = str(item["Key"])
        if Path(key).suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if key != address.key and not key.startswith(folder):
            continue  # a neighbour whose name begins like the prefix
        name = key.removeprefix(folder) if key.startswith(folder) else Path(key).name
        place = str(Address(address.bucket, key))
        yield Picture(name, place, item["ETag"].strip('"'), item["LastModified"].timestamp())
