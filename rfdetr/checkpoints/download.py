"""Published weights by name: downloaded once into a cache folder, and checked at every use.

A file must have the SHA-256 in `SHA256`. For a file without an entry there, the digest of the first
download is recorded beside it (`<name>.sha256`) and required from then on.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import hashlib
import http
import http.client
import logging
import os
import re
import ssl
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path

import filelock
from tqdm.auto import tqdm

from rfdetr.checkpoints.safe_io import StrPath
from rfdetr.errors import DownloadError
from rfdetr.files import (
    CHUNK_BYTES,
    atomic_path,
    remove_leftovers,
    sha256_file,
    user_cache_folder,
    write_text_atomic,
)

logger = logging.getLogger(__name__)

STORAGE = "https://storage.googleapis.com/rfdetr"  # of the public RF-DETR project
# published name -> object in the storage; a mirror has the files under their published names
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
# published name -> SHA-256, for the files whose digest is known from a source other than the server
SHA256: dict[str, str] = {}
TIMEOUT_S = 10.0  # without any data
ATTEMPTS = 3
LOCK_TIMEOUT_S = 3600.0
_INTERRUPTIONS = (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def cache_folder() -> Path:
    """Where downloaded weights are stored: `RF_HOME`, else the user's cache folder."""
    home = os.environ.get("RF_HOME")
    return Path(home) if home else user_cache_folder("weights")


def resolve_weights(name_or_path: StrPath) -> Path:
    """The local file for a path or a published name; downloads a name that is not cached.

    An existing file at that path is used unchecked. Raises FileNotFoundError for a path that does
    not exist and is not a published name, DownloadError when the download fails or a cached file is
    not the one that was downloaded.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = os.fspath(name_or_path)
    if name not in PUBLISHED:
        near = difflib.get_close_matches(path.name, PUBLISHED, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(
            f"No weight file {path.absolute()}, and it is not a published name.{hint} "
            f"Published names: {', '.join(PUBLISHED)}."
        )
    target = cache_folder() / name
    if not target.is_file():
        _download_once(name, target)
    elif problem := _digest_problem(target, target):
        raise DownloadError(
            f"{problem} Delete {target} to download it again; if you replaced it on purpose, "
            f"delete {_digest_file(target)}."
        )
    return target


def unavailable(name: str) -> str | None:
    """Why a published name cannot be resolved now, as a sentence; nothing is downloaded."""
    target = cache_folder() / name
    if target.is_file():
        return None
    try:
        request = urllib.request.Request(_address(name), method="HEAD")  # noqa: S310
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310
            return None
    except (OSError, ValueError, *_INTERRUPTIONS) as error:
        reason = getattr(error, "reason", None) or error
        return (
            f"{name} is not on this machine and cannot be downloaded now ({reason}): put the file "
            f"at {target}, or set RF_WEIGHTS_URL to a mirror."
        )


def _address(name: str) -> str:
    mirror = os.environ.get("RF_WEIGHTS_URL")
    return f"{mirror.rstrip('/')}/{name}" if mirror else f"{STORAGE}/{PUBLISHED[name]}"


def _download_once(name: str, target: Path) -> None:
    """Download under a lock, so that several processes fetch the file once."""
    url = _address(name)
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"RF_WEIGHTS_URL must start with http:// or https://; got {url}.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{target}.lock", timeout=LOCK_TIMEOUT_S):
            if not target.is_file():
                remove_leftovers(target.parent, target.name)  # of a killed process
                _download(url, target)
    except DownloadError:
        raise
    except filelock.Timeout as error:
        raise DownloadError(
            f"Another process has been downloading {name} for over an hour (lock {target}.lock)."
        ) from error
    except OSError as error:
        raise DownloadError(
            f"Cannot store {name} in {target.parent}: {error}. Set RF_HOME to a writable folder "
            "with enough space."
        ) from error


def _download(url: str, target: Path) -> None:
    """Fetch `url`, check it, and let it appear complete at `target`; retry if interrupted."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with atomic_path(target) as part:
                headers = _fetch(url, part, target.name)
                problem = _md5_problem(part, headers) or _digest_problem(part, target)
                if problem:
                    raise DownloadError(f"{url}: {problem} The download was discarded.")
            return
        except (urllib.error.URLError, *_INTERRUPTIONS) as error:
            if attempt == ATTEMPTS or isinstance(error, urllib.error.URLError):
                raise DownloadError(
                    f"Cannot download {url}: {str(error) or type(error).__name__}. Without network "
                    f"access, put the file at {target}, or set RF_WEIGHTS_URL to a mirror."
                ) from error
            logger.warning("%s was interrupted (%s); retrying.", url, error)


def _fetch(url: str, part: Path, name: str) -> Message:
    """Write the content of `url` to `part` and return the headers of the response."""
    # identity: a compressed response would have another size and checksum
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
        headers: Message = response.headers
        size = int(headers.get("Content-Length", 0))
        bar = tqdm(total=size or None, unit="B", unit_scale=True, desc=name, leave=False)
        with bar, open(part, "wb") as stream:
            while chunk := response.read(CHUNK_BYTES):
                stream.write(chunk)
                bar.update(len(chunk))
    missing = size - part.stat().st_size
    if size and missing:
        raise http.client.IncompleteRead(b"", missing)
    return headers


def _md5_problem(file: Path, headers: Message) -> str | None:
    """Damage in transit, by the MD5 that Google's storage sends with a file."""
    sent = re.search(r"md5=([A-Za-z0-9+/=]+)", ",".join(headers.get_all("x-goog-hash", [])))
    if sent is None:
        return None
    with open(file, "rb") as stream:
        actual = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    if base64.b64encode(actual.digest()).decode() == sent.group(1):
        return None
    return "The content does not match the MD5 that the server sent (x-goog-hash). Retry."


def _digest_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _digest_problem(file: Path, target: Path) -> str | None:
    """How `file` differs from the known SHA-256 of `target`, which is recorded if there is none."""
    record, actual = _digest_file(target), sha256_file(file)
    recorded = record.read_text().split()[:1] if record.is_file() else []
    known = SHA256.get(target.name) or "".join(recorded)
    if not known:
        known = actual
        with contextlib.suppress(OSError):  # a shared cache folder may be read-only
            write_text_atomic(record, f"{actual}  {target.name}\n")
            logger.info("%s: SHA-256 %s recorded in %s.", target.name, actual, record)
    if known == actual:
        return None
    source = "the published one" if target.name in SHA256 else f"recorded in {record}"
    return f"{target.name} has SHA-256 {actual}, not {known} ({source})."
