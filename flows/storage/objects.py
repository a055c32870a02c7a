"""Files to and from s3:// addresses: resumable, checked, with a progress bar.

Every object that we write carries its SHA-256 in the metadata. Folders: `flows.storage.prefixes`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flows.config.environment import Environment
from flows.core.digest import digest_of
from flows.core.files import write_json
from flows.storage.s3 import (
    SHA_KEY,
    TRIES,
    Address,
    DamagedError,
    StorageError,
    guard,
    head,
    make_client,
    on_threads,
)
from rfdetr.files import sha256_file

PART_BYTES = 16 << 20


def download(
    uri: str, target: str | os.PathLike[str], *, progress: bool = True, client: Any = None
) -> Path:
    """Fetch one object into the file `target`.

    An interrupted transfer goes on where it stopped (`.<name>.partial` beside the target holds
    the finished parts). The content is checked against the object's SHA-256 and size before it
    takes its name. Raises StorageError.
    """
    client = client or make_client()
    address, path = Address.parse(uri), Path(target)
    info = head(uri, client)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _Partial(path, info)
    with tqdm(
        total=info["size"], unit="B", unit_scale=True, desc=path.name, disable=not progress
    ) as bar:
        bar.update(partial.bytes_done)
        on_threads(
            lambda part: bar.update(_fetch_part(client, address, info["etag"], partial, part)),
            partial.missing(),
        )
    found = sha256_file(partial.data)
    if info["sha256"] and found != info["sha256"]:
        partial.remove()
        raise DamagedError(
            f"{address}: the content does not match its SHA-256 (expected {info['sha256']}, found "
            f"{found}). It was removed; upload the object again."
        )
    partial.data.replace(path)
    partial.remove()
    return path


class _Partial:
    """The finished parts of a download: a data file and a list of part numbers."""

    def __init__(self, target: Path, info: dict[str, Any]) -> None:
        self.size: int = info["size"]
        self.data = target.with_name(f".{target.name}.partial")
        self.journal = target.with_name(f".{target.name}.partial.parts")
        head_line = json.dumps({**info, "part": PART_BYTES})
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        if not self.data.exists() or not lines or lines[0] != head_line:
            self.data.write_bytes(b"")
            self.journal.write_text(head_line + "\n")
            lines = [head_line]
        self.done = {int(line) for line in lines[1:] if line.isdigit()}

    @property
    def bytes_done(self) -> int:
        return sum(end - start for start, end in map(self.span, self.done))

    def span(self, part: int) -> tuple[int, int]:
        return part * PART_BYTES, min(self.size, (part + 1) * PART_BYTES)

    def missing(self) -> list[int]:
        count = -(-self.size // PART_BYTES)
        return [part for part in range(count) if part not in self.done]

    def store(self, part: int, content: bytes) -> None:
        with open(self.data, "r+b") as stream:
            stream.seek(self.span(part)[0])
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        with open(self.journal, "a", encoding="ascii") as stream:
            stream.write(f"{part}\n")

    def remove(self) -> None:
        self.data.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)


def _fetch_part(client: Any, address: Address, etag: str, partial: _Partial, part: int) -> int:
    start, end = partial.span(part)

    def read() -> bytes:
        answer = client.get_object(**address.ids(), Range=f"bytes={start}-{end - 1}", IfMatch=etag)
        content: bytes = answer["Body"].read()
        return content

    content = _persist(lambda: guard(read, str(address)), lambda got: len(got) == end - start)
    partial.store(part, content)
    return len(content)


def _persist(call: Callable[[], bytes], complete: Callable[[bytes], bool]) -> bytes:
    """Repeat `call` while the connection breaks in the middle of a body."""
    for attempt in range(TRIES):
        try:
            content = call()
            if complete(content):
                return content
            problem: Exception = StorageError("the server sent too few bytes")
        except StorageError as error:
            if "changed during" in str(error) or attempt == TRIES - 1:
                raise
            problem = error
        time.sleep(min(8.0, 0.2 * 2**attempt))
    raise problem


def upload(
    source: str | os.PathLike[str], uri: str, *, progress: bool = True, client: Any = None
) -> str:
    """Send one file; its SHA-256. An object that already holds the content is left as it is.

    Large files go in parts; an interrupted transfer goes on with the next missing part.
    """
    client = client or make_client()
    path, address = Path(source), Address.parse(uri)
    if not path.is_file():
        raise StorageError(f"{path} is no file.")
    digest, size = sha256_file(path), path.stat().st_size
    try:
        there = head(uri, client)
    except StorageError:
        there = {}
    if there.get("sha256") == digest and there.get("size") == size:
        return digest
    with tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=not progress) as bar:
        if size <= PART_BYTES:
            body = path.read_bytes()
            metadata = {SHA_KEY: digest}
            guard(
                lambda: client.put_object(**address.ids(), Body=body, Metadata=metadata),
                str(address),
            )
            bar.update(size)
        else:
            _upload_parts(client, path, address, digest, bar)
    return digest


def _upload_parts(client: Any, path: Path, address: Address, digest: str, bar: Any) -> None:
    size = path.stat().st_size
    name = digest_of([str(address), digest, size, PART_BYTES])[:32]
    memory = Environment.read().state_dir / "uploads" / f"{name}.json"
    number, parts = _resume_upload(client, address, memory)
    if number is None:
        metadata = {SHA_KEY: digest}
        number = guard(
            lambda: client.create_multipart_upload(**address.ids(), Metadata=metadata), str(address)
        )["UploadId"]
        write_json(memory, {"upload_id": number})
    bar.update(sum(min(PART_BYTES, size - (n - 1) * PART_BYTES) for n in parts))

    def send(part: int) -> None:
        with open(path, "rb") as stream:
            stream.seek((part - 1) * PART_BYTES)
            body = stream.read(PART_BYTES)
        answer = guard(
            lambda: client.upload_part(
                **address.ids(), UploadId=number, PartNumber=part, Body=body
            ),
            str(address),
        )
        parts[part] = answer["ETag"]
        bar.update(len(body))

    count = -(-size // PART_BYTES)
    on_threads(send, [part for part in range(1, count + 1) if part not in parts])
    listed = [{"PartNumber": part, "ETag": parts[part]} for part in sorted(parts)]
    guard(
        lambda: client.complete_multipart_upload(
            **address.ids(), UploadId=number, MultipartUpload={"Parts": listed}
        ),
        str(address),
    )
    memory.unlink(missing_ok=True)


def _resume_upload(
    client: Any, address: Address, memory: Path
) -> tuple[str | None, dict[int, str]]:
    """The open upload of the same content and its finished parts, if the server still has it."""
    if not memory.exists():
        return None, {}
    number = str(json.loads(memory.read_text(encoding="utf-8"))["upload_id"])
    try:
        pages = client.get_paginator("list_parts").paginate(**address.ids(), UploadId=number)
        found = guard(lambda: [p for page in pages for p in page.get("Parts", [])], str(address))
    except StorageError:
        return None, {}
    return number, {int(part["PartNumber"]): part["ETag"] for part in found}
