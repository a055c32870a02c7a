"""Single files to and from s3:// addresses, by boto3's transfer manager, with a progress bar.

Every uploaded object carries its SHA-256 in the metadata. A download is checked against it, or else
against the MD5 sum that is the ETag of most objects. An interrupted transfer of one object
restarts: for 1 GB that costs the seconds already spent, and transfers are as fast as the
hand-written resume of parts that this replaced (measured by tests/benchmarks/bench_storage.py).
Transfers of folders resume per file: `flows.storage.prefixes`.
"""

from __future__ import annotations

import contextlib
import hashlib
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
    ChangedError,
    DamagedError,
    ObjectInfo,
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
    etag: str | None = None,
) -> Path:
    """Fetch one object into the file `target`, which appears or changes only when it is complete.

    The content is that of one object, never parts of two, whether or not the server supports
    conditional requests. An object that is replaced meanwhile is fetched again, or refused if
    `etag` names the wanted one. Raises NotFoundError, ChangedError, DamagedError if the size or
    SHA-256 is wrong, or another StorageError.
    """
    client = client or make_client()
    address, path = Address.parse(uri), Path(target)
    last = None
    with atomic_path(path) as temporary:
        for _ in range(TRIES):
            info = head(uri, client)
            if etag not in (None, info.etag):
                break
            try:
                with _bar(path, info.size, progress) as advance:
                    _receive(client, address, temporary, advance, threads)
            except ChangedError:
                continue
            matches = _matches(temporary, info)
            if matches:
                return path
            if head(uri, client) != info:
                continue
            if matches is False:
                raise DamagedError(_damage(temporary, info, address))
            found = info, sha256_file(temporary)
            if not info.etag_is_md5 or found == last:
                return path
            last = found
        raise ChangedError(f"{address} was replaced during the transfer. Try again.")


def _receive(
    client: Any, address: Address, target: Path, advance: Callable[[int], object], threads: int
) -> None:
    with open(target, "wb") as stream:
        guard(
            lambda: client.download_fileobj(
                **address.ids(), Fileobj=stream, Callback=advance, Config=_config(threads)
            ),
            str(address),
        )


def _matches(path: Path, info: ObjectInfo) -> bool | None:
    """Whether the file is the content of an object; None if what the server says cannot tell.

    An ETag that differs from the MD5 sum proves nothing: some servers compute it in another way.
    """
    if path.stat().st_size != info.size:
        return False
    if info.sha256 is not None:
        return sha256_file(path) == info.sha256
    if not info.etag_is_md5:
        return None
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    return digest.hexdigest() == info.etag or None


def _damage(path: Path, info: ObjectInfo, address: Address) -> str:
    size = path.stat().st_size
    if size != info.size:
        return f"{address}: {size} of {info.size} bytes arrived. Try again."
    return (
        f"{address}: the content does not match its SHA-256 (expected {info.sha256}, found "
        f"{sha256_file(path)}). The download was removed; upload the object again."
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
    with contextlib.suppress(StorageError):  # missing, or keys that may write but not read
        present = head(uri, client)
        if (present.sha256, present.size) == (digest, size):
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
    if sha256_file(path) != digest:
        raise ChangedError(f"{path} changed while it was uploaded to {address}. Upload it again.")
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
