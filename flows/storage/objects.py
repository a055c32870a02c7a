"""Single files to and from s3:// addresses, by boto3's transfer manager, with a progress bar.

Every uploaded object carries its SHA-256 in the metadata; a download is checked against it. An
interrupted transfer of one object restarts: for 1 GB that costs the seconds already spent, and
transfers are as fast as the hand-written resume of parts that this replaced (measured by
tests/benchmarks/bench_storage.py). Transfers of folders resume per file: `flows.storage.prefixes`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flows.storage.s3 import (
    SHA_KEY,
    THREADS,
    TRIES,
    Address,
    DamagedError,
    StorageError,
    guard,
    head,
    make_client,
)
from rfdetr.files import atomic_path, sha256_file

PART_BYTES = 16 << 20


def download(
    uri: str,
    target: str | os.PathLike[str],
    *,
    progress: bool = True,
    client: Any = None,
    threads: int = THREADS,
) -> Path:
    """Fetch one object into the file `target`, which appears or changes only when it is complete.

    Raises NotFoundError, DamagedError if the size or SHA-256 is wrong, or another StorageError.
    """
    client = client or make_client()
    address, path = Address.parse(uri), Path(target)
    info = head(uri, client)
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as stream, _bar(path, info["size"], progress) as advance:
            guard(
                lambda: client.download_fileobj(
                    **address.ids(), Fileobj=stream, Callback=advance, Config=_config(threads)
                ),
                str(address),
            )
        _check(temporary, info, address)
    return path


def _check(path: Path, info: dict[str, Any], address: Address) -> None:
    size = path.stat().st_size
    if size != info["size"]:
        raise DamagedError(f"{address}: {size} of {info['size']} bytes arrived. Try again.")
    found = sha256_file(path) if info["sha256"] else None
    if found != info["sha256"]:
        raise DamagedError(
            f"{address}: the content does not match its SHA-256 (expected {info['sha256']}, found "
            f"{found}). The download was removed; upload the object again."
        )


def upload(
    source: str | os.PathLike[str],
    uri: str,
    *,
    progress: bool = True,
    client: Any = None,
    threads: int = THREADS,
) -> str:
    """Send one file and return its SHA-256. An object that already has this content is kept."""
    client = client or make_client()
    path, address = Path(source), Address.parse(uri)
    if not path.is_file():
        raise StorageError(f"{path} is not a file.")
    digest, size = sha256_file(path), path.stat().st_size
    try:
        present = head(uri, client)
    except StorageError:  # missing, or keys that may write but not read
        present = {}
    if (present.get("sha256"), present.get("size")) == (digest, size):
        return digest
    with _bar(path, size, progress) as advance:
        guard(
            lambda: client.upload_file(
                str(path),
                address.bucket,
                address.key,
                ExtraArgs={"Metadata": {SHA_KEY: digest}},
                Callback=advance,
                Config=_config(threads),
            ),
            str(address),
        )
    return digest


@contextlib.contextmanager
def _bar(path: Path, size: int, progress: bool) -> Iterator[Callable[[int], object]]:
    with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=not progress) as bar:
        yield bar.update


def _config(threads: int) -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_concurrency=threads,
        num_download_attempts=TRIES,
        use_threads=threads > 1,
    )
