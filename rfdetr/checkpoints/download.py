"""Published weights by name: a cache folder, and downloads that resume and are checked.

The addresses are those of the public project's storage; `RF_WEIGHTS_URL` names a mirror that holds
the files under their published names instead.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import hashlib
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import filelock
from tqdm.auto import tqdm

from rfdetr.checkpoints.safe_io import StrPath
from rfdetr.errors import DownloadError
from rfdetr.files import CHUNK_BYTES, user_cache_folder

logger = logging.getLogger(__name__)

STORAGE = "https://storage.googleapis.com/rfdetr"
# published name -> object in the storage
PUBLISHED = {
    "rf-detr-nano.pth": "nano_coco/checkpoint_best_regular.pth",
    "rf-detr-small.pth": "small_coco/checkpoint_best_regular.pth",
    "rf-detr-medium.pth": "medium_coco/checkpoint_best_regular.pth",
    "rf-detr-base.pth": "rf-detr-base-coco.pth",
    "rf-detr-base-2.pth": "rf-detr-base-2.pth",
    "rf-detr-large.pth": "rf-detr-large.pth",
    "rf-detr-large-2026.pth": "rf-detr-large-2026.pth",
    "rf-detr-seg-preview.pt": "rf-detr-seg-preview.pt",
    "rf-detr-seg-nano.pt": "rf-detr-seg-n-ft.pth",
    "rf-detr-seg-small.pt": "rf-detr-seg-s-ft.pth",
    "rf-detr-seg-medium.pt": "rf-detr-seg-m-ft.pth",
    "rf-detr-seg-large.pt": "rf-detr-seg-l-ft.pth",
    "rf-detr-seg-xlarge.pt": "rf-detr-seg-xl-ft.pth",
    "rf-detr-seg-xxlarge.pt": "rf-detr-seg-2xl-ft.pth",
}
TIMEOUT_S = 10.0
ATTEMPTS = 3
LOCK_TIMEOUT_S = 3600.0


def cache_folder() -> Path:
    """Where downloaded weights live: `RF_HOME`, else the user's cache folder."""
    home = os.environ.get("RF_HOME")
    return Path(home) if home else user_cache_folder("weights")


def resolve_weights(name_or_path: StrPath) -> Path:
    """The local file for a path or a published name; downloads a name that is not cached.

    A file at that path is always used as it is. Raises FileNotFoundError for a path that does not
    exist and is no published name, DownloadError when the download cannot be completed.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    name = os.fspath(name_or_path)
    if name not in PUBLISHED:
        near = difflib.get_close_matches(path.name, PUBLISHED, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(
            f"No weight file {path.absolute()}, and it is no published name.{hint} "
            f"Published names: {', '.join(PUBLISHED)}."
        )
    target = cache_folder() / name
    if not target.is_file():
        _download_once(name, target)
    return target


def weights_url(name: str) -> str:
    """The address of a published file, at the mirror if `RF_WEIGHTS_URL` is set."""
    mirror = os.environ.get("RF_WEIGHTS_URL")
    url = f"{mirror.rstrip('/')}/{name}" if mirror else f"{STORAGE}/{PUBLISHED[name]}"
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"RF_WEIGHTS_URL must start with http:// or https://; got {url}.")
    return url


def _download_once(name: str, target: Path) -> None:
    """Download under a lock, so that several processes fetch the file once."""
    url = weights_url(name)
    lock = filelock.FileLock(f"{target}.lock", timeout=LOCK_TIMEOUT_S)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            if not target.is_file():
                download(url, target)
    except DownloadError:
        raise
    except filelock.Timeout as error:
        raise DownloadError(
            f"Another process has been fetching {name} for over an hour (lock {target}.lock)."
        ) from error
    except OSError as error:
        raise DownloadError(
            f"{target.parent} cannot hold downloads: {error}. Set RF_HOME to a folder that can."
        ) from error


def download(url: str, target: Path) -> None:
    """Fetch `url` into `target`: resumes `target`.part, checks the content, then renames.

    Raises DownloadError with the reason and what to do; a partial file stays for the next call.
    """
    transfer = _Transfer(url, target)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            transfer.run()
            return
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            if isinstance(error, DownloadError):
                raise
            if attempt == ATTEMPTS or not transfer.progressed:
                raise DownloadError(transfer.explain(error)) from error
            logger.warning("%s was interrupted (%s); attempt %d.", url, error, attempt + 1)
            time.sleep(0.2 * attempt)


@dataclass
class _Transfer:
    """One file on its way; `target`.part and `target`.part.json hold what has arrived so far."""

    url: str
    target: Path
    progressed: bool = False

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def note(self) -> Path:
        return self.target.with_name(self.target.name + ".part.json")

    def run(self) -> None:
        """Fetch what is missing, check all of it, and put it in place."""
        self.progressed = False
        start, headers = self._resume_point()
        try:
            answer = _open(self.url, headers)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not start:
                raise
            self._forget()
            start, answer = 0, _open(self.url, {})
        with answer:
            if start and not _continues(answer, start):
                start = 0
            total = _total_size(answer.headers, start)
            self.note.write_text(json.dumps({"validator": _validator(answer.headers)}))
            self._receive(answer, start, total)
            headers_seen = answer.headers
        size = self.part.stat().st_size
        if total is not None and size != total:
            raise http.client.IncompleteRead(b"", total - size)
        problem = self._problem(headers_seen)
        if problem:
            self._forget()
            if not start:
                raise DownloadError(problem)
            self.run()  # the older part was at fault, perhaps
            return
        self.part.replace(self.target)
        self.note.unlink(missing_ok=True)

    def explain(self, error: Exception) -> str:
        """Reason and remedy for a person."""
        kept = ""
        if self.part.exists():
            kept = f" {self.part} is kept; the next call goes on from there."
        if isinstance(error, urllib.error.HTTPError):
            reason = f"the server answered {error.code} {error.reason}"
        else:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        return (
            f"Cannot download {self.url}: {reason}.{kept} Without network, put the file at "
            f"{self.target}, or set RF_WEIGHTS_URL to a mirror."
        )

    def _resume_point(self) -> tuple[int, dict[str, str]]:
        """Bytes that are there already, and the headers that ask for the rest of the same file."""
        try:
            validator = json.loads(self.note.read_text())["validator"]
            size = self.part.stat().st_size
        except (OSError, ValueError, KeyError):
            size = 0
        if not size:
            self._forget()
            return 0, {}
        condition = {"If-Range": validator} if validator else {}  # else the checksum decides
        return size, {"Range": f"bytes={size}-", **condition}

    def _receive(self, answer: Any, start: int, total: int | None) -> None:
        bar = tqdm(
            total=total,
            initial=start,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc=self.target.name,
            leave=False,
        )
        with bar, open(self.part, "ab" if start else "wb") as stream:
            while chunk := answer.read(CHUNK_BYTES):
                stream.write(chunk)
                bar.update(len(chunk))
                self.progressed = True
            stream.flush()
            os.fsync(stream.fileno())

    def _problem(self, headers: Message) -> str | None:
        """What is wrong with the content of the finished part file, by its checksum."""
        expected = _pinned_sha256(self.url) or _md5_of(headers)
        if expected is None:
            logger.warning("%s gives no checksum; only the size was checked.", self.url)
            return None
        source, algorithm, digest = expected
        actual = hashlib.new(algorithm, usedforsecurity=False)
        with open(self.part, "rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                actual.update(chunk)
        if actual.hexdigest() == digest:
            return None
        return (
            f"{self.url}: {algorithm} {actual.hexdigest()} differs from {digest} given by "
            f"{source}. The download was thrown away; try again or tell the server's owner."
        )

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _open(url: str, headers: Mapping[str, str]) -> Any:
    # identity: a compressed answer would have other sizes and checksums
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", **headers})  # noqa: S310
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310


def _continues(answer: Any, start: int) -> bool:
    """Whether the server really goes on at byte `start` (one without ranges starts again)."""
    if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
        return False
    match = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return match is not None and int(match.group(1)) == start


def _total_size(headers: Message, start: int) -> int | None:
    length = headers.get("Content-Length", "")
    return start + int(length) if length.isdigit() else None


def _validator(headers: Message) -> str | None:
    """What identifies this version of the file; weak tags do not (RFC 9110, section 13.1.5)."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _md5_of(headers: Message) -> tuple[str, str, str] | None:
    """(source, "md5", hexadecimal digest) by the server's headers, or None."""
    hashes = ",".join(headers.get_all("x-goog-hash", []))
    google = re.search(r"md5=([A-Za-z0-9+/=]+)", hashes)
    partial = headers.get("Content-Range") is not None  # Content-MD5 then covers the part only
    header = None if partial else headers.get("Content-MD5")
    for source, encoded in (("x-goog-hash", google and google.group(1)), ("Content-MD5", header)):
        if encoded:
            with contextlib.suppress(ValueError):
                return source, "md5", base64.b64decode(encoded, validate=True).hex()
    tag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
    if tag and "aws:kms" not in headers.get("x-amz-server-side-encryption", ""):
        return "ETag", "md5", tag.group(1)
    return None


def _pinned_sha256(url: str) -> tuple[str, str, str] | None:
    """The digest in `url`.sha256, when a mirror's owner put one there."""
    if not os.environ.get("RF_WEIGHTS_URL"):
        return None
    try:
        with _open(url + ".sha256", {}) as answer:
            text = answer.read(4096).decode("ascii", "replace")
    except urllib.error.HTTPError:
        return None
    match = re.match(r"\s*([0-9a-fA-F]{64})\b", text)
    return (url + ".sha256", "sha256", match.group(1).lower()) if match else None
