"""Source images from files, folders and s3:// prefixes: listed first, fetched when needed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.storage.objects import download
from flows.storage.s3 import Address, ChangedError, DamagedError, guard, is_s3, make_client
from rfdetr.data.decode import IMAGE_SUFFIXES
from rfdetr.errors import DatasetError

# Errors of a single object; other errors of S3 concern all of them.
UNUSABLE = (FileNotFoundError, DamagedError, ChangedError)


@dataclass(frozen=True)
class SourceImage:
    """One image. `name` is unique within a listing; `stamp` changes when the content changes."""

    name: str
    address: str  # a path, or an s3:// address
    stamp: str
    modified: float  # Unix time in seconds


def list_images(sources: Sequence[str], *, exclude: Path | None = None) -> list[SourceImage]:
    """The images of files, folders and s3:// addresses, ordered by source and name.

    Names are relative to their source. Everything below the folder `exclude` is skipped. Raises
    DatasetError if a source does not exist, if there are no images, or if two images would have the
    same name.
    """
    found: dict[str, SourceImage] = {}
    for source in sources:
        for image in _in_bucket(source) if is_s3(source) else _in_folder(source, exclude):
            other = found.setdefault(image.name, image)
            if other.address != image.address:
                raise DatasetError(
                    f"{other.address} and {image.address} would both be named {image.name}. Use "
                    "their common parent folder as the source, or run once per source."
                )
    if not found:
        raise DatasetError(
            f"No images in {', '.join(sources)}. Supported: {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return list(found.values())


def newest(
    images: Sequence[SourceImage], *, hours: float | None = None, limit: int | None = None
) -> list[SourceImage]:
    """The images of the last `hours`, at most `limit`, newest first."""
    earliest = 0.0 if hours is None else time.time() - 3600 * hours
    recent = [image for image in images if image.modified >= earliest]
    return sorted(recent, key=lambda p: (-p.modified, p.name))[:limit]


def fetch_image(image: SourceImage, target: Path, client: Any = None) -> Path:
    """The path of the image, downloaded to `target` if it is on S3. Raises StorageError."""
    if not is_s3(image.address):
        return Path(image.address)
    return download(image.address, target, progress=False, client=client)


def _in_folder(source: str, exclude: Path | None) -> Iterator[SourceImage]:
    base = Path(source)
    if base.is_file():
        yield _of_file(base, base.name)
    elif base.is_dir():
        inner = None if exclude is None else os.path.realpath(exclude)  # no error for a link loop
        for file in sorted(base.rglob("*")):
            excluded = inner is not None and Path(os.path.realpath(file)).is_relative_to(inner)
            if file.suffix.lower() in IMAGE_SUFFIXES and not excluded:
                yield _of_file(file, file.relative_to(base).as_posix())
    else:
        raise DatasetError(f"{source} does not exist.")


def _of_file(file: Path, name: str) -> SourceImage:
    try:
        status = file.stat()
    except OSError:  # a dangling link or a vanished file: reading it says what is wrong
        return SourceImage(name, str(file), "missing", 0.0)
    stamp = f"{status.st_size}-{status.st_mtime_ns}"
    return SourceImage(name, str(file), stamp, status.st_mtime)


def _in_bucket(source: str) -> Iterator[SourceImage]:
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
            continue  # another prefix that starts with the same characters
        name = key.removeprefix(folder) if key.startswith(folder) else Path(key).name
        where = str(Address(address.bucket, key))
        yield SourceImage(name, where, item["ETag"].strip('"'), item["LastModified"].timestamp())
