"""S3: addresses, the client, listings, and errors that say what to do.

Endpoint and keys come from the AWS_* environment variables or the files that boto3 reads.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, NamedTuple

from flows.core.redact import redact
from rfdetr.errors import RFDETRError

THREADS = 8
TRIES = 5
SHA_KEY = "sha256"
REFUSED = (400, 401, 403)
MD5_ETAG = re.compile(r"[0-9a-f]{32}")


class StorageError(RFDETRError, OSError):
    """An object that cannot be read, written or trusted."""

    transient = True


class NotFoundError(StorageError, FileNotFoundError):
    """An object or a bucket that does not exist."""

    transient = False


class AccessError(StorageError):
    """An address or credentials that the server will not accept at the next try either."""

    transient = False


class DamagedError(StorageError):
    """An object whose content differs from what was uploaded."""


class ChangedError(StorageError):
    """An object that was replaced during its transfer."""


@dataclasses.dataclass(frozen=True)
class Address:
    """`s3://bucket/key`."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, uri: str) -> Address:
        """Raises StorageError if `uri` is not an s3:// address with a bucket and a key."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        if not uri.startswith("s3://") or not bucket or not key.strip("/"):
            raise AccessError(f"{redact(uri)} is not an address of the form s3://bucket/key.")
        return cls(bucket, key)

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def ids(self) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.key}


def is_s3(text: str) -> bool:
    """Whether `text` is an s3:// address."""
    return text.startswith("s3://")


def make_client() -> Any:
    """A boto3 client with timeouts, retries, and signatures that every S3 server accepts.

    Raises StorageError if the address of the server is not a URL.
    """
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "max_attempts": TRIES},
        connect_timeout=10,
        read_timeout=60,
        signature_version="s3v4",
        max_pool_connections=2 * THREADS,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return guard(lambda: boto3.session.Session().client("s3", config=config), "S3")
    except ValueError as error:  # boto3's own words: "Invalid endpoint: 127.0.0.1:9000"
        raise StorageError(
            f"S3: {redact(str(error))}. An address in AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3, or "
            "endpoint_url in the AWS configuration file) starts with http:// or https://."
        ) from None


HINTS = {
    "403": "the keys have no right to it",
    "AccessDenied": "the keys have no right to it",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "InvalidAccessKeyId": "the server does not know the access key",
    "ExpiredToken": "the session token has expired; get new credentials",
    "RequestTimeTooSkewed": "the clock of this machine is wrong",
    "404": "it does not exist",
    "NoSuchKey": "it does not exist",
    "NoSuchBucket": "the bucket does not exist",
    "412": "it changed during the transfer",
    "PreconditionFailed": "it changed during the transfer",
}
MISSING = {"404", "NoSuchKey", "NoSuchBucket"}
CHANGED = {"412", "PreconditionFailed"}


def guard(call: Callable[[], Any], what: str) -> Any:
    """Run `call`; every error of boto3 becomes a StorageError that names `what`."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return call()
    except (BotoCoreError, ClientError) as error:
        raise _storage_error(what, error) from None
    except Boto3Error as error:  # of the transfer manager; the cause is inside
        cause = getattr(error, "last_exception", None) or error.__context__ or error
        raise _storage_error(what, cause) from None


def _storage_error(what: str, error: BaseException) -> StorageError:
    from botocore.exceptions import (
        ClientError,
        ConfigParseError,
        InvalidRegionError,
        NoCredentialsError,
        ProfileNotFound,
    )

    if isinstance(error, NoCredentialsError):
        return AccessError(
            f"{what}: no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and "
            "AWS_ENDPOINT_URL for a server other than Amazon's)."
        )
    if isinstance(error, ProfileNotFound | ConfigParseError | InvalidRegionError):
        advice = "Correct AWS_PROFILE, AWS_DEFAULT_REGION or the files in ~/.aws"
        return AccessError(f"{what}: {redact(str(error))}. {advice}.")
    if not isinstance(error, ClientError):
        return StorageError(f"{what}: {redact(str(error))}")
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    kind: type[StorageError] = AccessError if status in REFUSED else StorageError
    if code in MISSING | CHANGED:
        kind = NotFoundError if code in MISSING else ChangedError
    return kind(f"{what}: {HINTS.get(code, redact(str(error)))} ({code}).")


class ObjectInfo(NamedTuple):
    """What a server says about one object. Equal for two requests if nothing replaced it."""

    size: int
    etag: str  # without quotes
    modified: datetime
    sha256: str | None  # in the metadata of objects that this package uploaded
    etag_is_md5: bool  # it looks like the MD5 sum of the content


def head(uri: str, client: Any = None) -> ObjectInfo:
    """Size, ETag, time and SHA-256 of one object. Raises NotFoundError or another StorageError."""
    address = Address.parse(uri)
    client = client or make_client()
    answer = guard(lambda: client.head_object(**address.ids()), str(address))
    metadata = {key.lower(): value for key, value in answer.get("Metadata", {}).items()}
    etag = str(answer.get("ETag", "")).strip('"')
    encrypted = answer.get("SSECustomerAlgorithm") or "kms" in answer.get(
        "ServerSideEncryption", ""
    )
    return ObjectInfo(
        size=int(answer["ContentLength"]),
        etag=etag,
        modified=answer["LastModified"],
        sha256=metadata.get(SHA_KEY),
        etag_is_md5=bool(MD5_ETAG.fullmatch(etag)) and not encrypted,
    )


class Listed(NamedTuple):
    """One object of a listing; the ETag changes whenever the content does."""

    address: str
    size: int
    etag: str


def list_objects(uri: str, client: Any = None) -> Iterator[Listed]:
    """Every object under a prefix except folder markers."""
    address = Address.parse(uri)
    client = client or make_client()
    prefix = address.key.rstrip("/") + "/"
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=address.bucket, Prefix=prefix)
    found = guard(lambda: [o for page in pages for o in page.get("Contents", [])], str(address))
    for item in found:
        if not item["Key"].endswith("/"):
            where = f"s3://{address.bucket}/{item['Key']}"
            yield Listed(where, int(item["Size"]), item["ETag"].strip('"'))


def on_threads(work: Callable[[Any], Any], items: Iterable[Any]) -> None:
    """Run `work` for every item on a few threads; the first error cancels what has not started."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for _ in pool.map(work, items):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def list_versions(uri: str, client: Any = None) -> list[tuple[str, str]]:
    """Sorted (address, ETag) of every object below `uri`: identifies the content of a prefix.

    As in `flows.storage.prefixes.fetch`, the address of one object means that object. Raises
    NotFoundError if there is nothing.
    """
    client = client or make_client()
    found = sorted((item.address, item.etag) for item in list_objects(uri, client))
    return found or [(uri, head(uri, client).etag)]
