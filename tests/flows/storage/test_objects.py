"""Transfers with a real S3 server: interruptions, checksums, folders, errors without secrets."""

from __future__ import annotations

import hashlib
import itertools
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from flows.storage import objects
from flows.storage import s3 as s3_module
from flows.storage.objects import download, upload
from flows.storage.prefixes import download_tree, fetch, upload_tree
from flows.storage.s3 import (
    ChangedError,
    NotFoundError,
    StorageError,
    head,
    list_objects,
    list_versions,
    make_client,
)
from rfdetr.files import sha256_file
from tests.flows.servers import S3Server

MIB = 1 << 20


class Broken(Exception):
    """The connection of a test breaks."""


class Faulty:
    """A real client that breaks at the n-th request of one kind, and counts these requests."""

    def __init__(self, operation: str, break_at: int = 10**9) -> None:
        self.break_at, self.calls = break_at, 0
        self.client = make_client()
        self.client.meta.events.register(f"before-call.s3.{operation}", self._on_request)

    def _on_request(self, **_: Any) -> None:
        self.calls += 1
        if self.calls >= self.break_at:
            raise Broken


@pytest.fixture
def big(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(objects, "PART_BYTES", 5 * MIB)
    file = tmp_path / "big.bin"
    file.write_bytes(os.urandom(13 * MIB))
    return file


def test_a_file_comes_back_equal_and_carries_its_checksum(s3: S3Server, tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(os.urandom(12345))
    digest = upload(file, "s3://data/x/a.bin", progress=False)
    info = head("s3://data/x/a.bin")
    assert (info.size, info.sha256, info.etag_is_md5) == (12345, digest, True)
    back = download("s3://data/x/a.bin", tmp_path / "new" / "b.bin", progress=False)
    assert sha256_file(back) == digest == sha256_file(file)
    assert [path.name for path in back.parent.iterdir()] == ["b.bin"]


def test_an_interrupted_download_leaves_the_old_file(
    s3: S3Server, tmp_path: Path, big: Path
) -> None:
    upload(big, "s3://data/big.bin", progress=False)
    target = tmp_path / "out" / "big.bin"
    target.parent.mkdir()
    target.write_text("old")
    with pytest.raises(Broken):
        download("s3://data/big.bin", target, progress=False, client=Faulty("GetObject", 3).client)
    assert [path.name for path in target.parent.iterdir()] == ["big.bin"]
    assert target.read_text() == "old"
    download("s3://data/big.bin", target, progress=False)
    assert sha256_file(target) == sha256_file(big)


def test_ctrl_c_ends_a_download(s3: S3Server, tmp_path: Path, big: Path) -> None:
    upload(big, "s3://data/big.bin", progress=False)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("s3transfer.futures.TransferFuture.result", Mock(side_effect=interrupt))
        download("s3://data/big.bin", tmp_path / "out" / "big.bin", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_upload_leaves_no_object(s3: S3Server, tmp_path: Path, big: Path) -> None:
    with pytest.raises(Broken):
        upload(big, "s3://data/up.bin", progress=False, client=Faulty("UploadPart", 3).client)
    with pytest.raises(NotFoundError):
        head("s3://data/up.bin")
    upload(big, "s3://data/up.bin", progress=False)
    assert head("s3://data/up.bin").sha256 == sha256_file(big)
    assert sha256_file(download("s3://data/up.bin", tmp_path / "again")) == sha256_file(big)
    idle = Faulty("CreateMultipartUpload")
    upload(big, "s3://data/up.bin", progress=False, client=idle.client)
    assert idle.calls == 0


@pytest.mark.parametrize("checksum", [True, False])
def test_an_object_that_is_replaced_during_its_download_arrives_as_the_new_one(
    s3: S3Server, tmp_path: Path, big: Path, checksum: bool
) -> None:
    """The server ignores If-Match, so the parts of the first attempt come from two objects."""
    put("c.bin", big.read_bytes())
    client, new = replacing("c.bin", at=2, times=1, checksum=checksum)
    download("s3://data/c.bin", tmp_path / "out" / "c", progress=False, client=client)
    assert (tmp_path / "out" / "c").read_bytes() == new()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["c"]


def test_an_object_that_keeps_changing_is_refused(
    s3: S3Server, tmp_path: Path, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "TRIES", 2)
    put("c.bin", big.read_bytes())
    client, _ = replacing("c.bin", at=2, times=99, checksum=False)
    with pytest.raises(ChangedError, match="was replaced during the transfer"):
        download("s3://data/c.bin", tmp_path / "out" / "c", progress=False, client=client)
    assert list((tmp_path / "out").iterdir()) == []


def replacing(key: str, *, at: int, times: int, checksum: bool) -> tuple[Any, Any]:
    """A client whose object is replaced at every `at`-th GET, and what it was replaced with."""
    client, calls, contents = make_client(), itertools.count(1), [b""]

    def change(**_: Any) -> None:
        if next(calls) % at == 0 and len(contents) <= times:
            contents.append(os.urandom(13 * MIB))
            known = {"sha256": hashlib.sha256(contents[-1]).hexdigest()} if checksum else {}
            make_client().put_object(Bucket="data", Key=key, Body=contents[-1], Metadata=known)

    client.meta.events.register_first("before-call.s3.GetObject", change)
    return client, lambda: contents[-1]


def test_an_object_that_vanishes_during_its_download_is_a_missing_file(
    s3: S3Server, tmp_path: Path, big: Path
) -> None:
    put("v.bin", big.read_bytes())
    client = make_client()

    def vanish(**_: Any) -> None:
        make_client().delete_object(Bucket="data", Key="v.bin")

    client.meta.events.register_first("before-call.s3.GetObject", vanish)
    with pytest.raises(NotFoundError):
        download("s3://data/v.bin", tmp_path / "out" / "v", progress=False, client=client)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_etag_that_is_not_an_md5_sum_is_accepted_after_a_second_look(
    s3: S3Server, tmp_path: Path
) -> None:
    put("odd.bin", b"abc")
    counting = Faulty("GetObject")

    def other_etag(parsed: dict[str, Any], **_: Any) -> None:
        parsed["ETag"] = '"' + "0" * 32 + '"'

    counting.client.meta.events.register("after-call.s3.HeadObject", other_etag)
    found = download("s3://data/odd.bin", tmp_path / "odd", progress=False, client=counting.client)
    assert (found.read_bytes(), counting.calls) == (b"abc", 2)


def test_a_file_that_changes_during_its_upload_is_reported(
    s3: S3Server, tmp_path: Path, big: Path
) -> None:
    client = make_client()

    def rewrite(**_: Any) -> None:
        big.write_bytes(os.urandom(13 * MIB))

    client.meta.events.register_first("before-call.s3.CreateMultipartUpload", rewrite)
    with pytest.raises(ChangedError, match="changed while it was uploaded"):
        upload(big, "s3://data/moving.bin", progress=False, client=client)


def test_a_wrong_checksum_is_refused_and_leaves_nothing(s3: S3Server, tmp_path: Path) -> None:
    make_client().put_object(
        Bucket="data", Key="bad.bin", Body=b"abc", Metadata={"SHA256": "0" * 64}
    )
    with pytest.raises(StorageError, match="does not match its SHA-256"):
        download("s3://data/bad.bin", tmp_path / "out" / "bad.bin", progress=False)
    assert list((tmp_path / "out").iterdir()) == []


def test_folders_travel_and_resume(s3: S3Server, tmp_path: Path) -> None:
    source = tmp_path / "set"
    for name in ("train/a.png", "train/b c.png", "valid/ü.png", "x.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(os.urandom(1000))
    assert upload_tree(source, "s3://data/sets/one", progress=False) == 4
    assert len(list(list_objects("s3://data/sets/one"))) == 4
    target = tmp_path / "copy"
    partial = tmp_path / ".copy.partial" / "x.json"
    partial.parent.mkdir()
    partial.write_bytes((source / "x.json").read_bytes())
    assert fetch("s3://data/sets/one", target, progress=False) == target
    for path in source.rglob("*.*"):
        assert (target / path.relative_to(source)).read_bytes() == path.read_bytes()
    with pytest.raises(StorageError, match="exists already"):
        download_tree("s3://data/sets/one", target, progress=False)


def put(key: str, content: bytes) -> None:
    make_client().put_object(Bucket="data", Key=key, Body=content)


def test_a_folder_with_a_marker_object_is_a_folder(s3: S3Server, tmp_path: Path) -> None:
    put("marked/a.txt", b"a")
    real = make_client()

    class Marked:
        """The server of the tests makes a folder of a marker, others a file."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def head_object(self, **ids: str) -> Any:
            if ids["Key"] == "marked/":
                return {"ContentLength": 0, "ETag": "e", "LastModified": datetime.now(UTC)}
            return real.head_object(**ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objects, "make_client", Marked)
        patch.setattr(s3_module, "make_client", Marked)
        fetch("s3://data/marked/", tmp_path / "set", progress=False)
    assert (tmp_path / "set" / "a.txt").read_bytes() == b"a"


def test_an_interrupted_folder_resumes_with_the_files_that_have_not_changed(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt", "gone/c.txt", "z.txt"):
        put(f"moving/{name}", b"old")
    monkeypatch.setattr(s3_module, "THREADS", 1)
    faulty = Faulty("GetObject", 4)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Broken):
        patch.setattr("flows.storage.prefixes.make_client", lambda: faulty.client)
        download_tree("s3://data/moving", tmp_path / "set", progress=False)
    put("moving/b.txt", b"new")  # as long as before
    make_client().delete_object(Bucket="data", Key="moving/gone/c.txt")
    counting = Faulty("GetObject")
    monkeypatch.setattr("flows.storage.prefixes.make_client", lambda: counting.client)
    target = download_tree("s3://data/moving", tmp_path / "set", progress=False)
    found = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*.*")}
    assert found == {"a.txt": b"old", "b.txt": b"new", "z.txt": b"old"}
    assert not (target / "gone").exists()
    assert counting.calls == 2  # b and z; a was there
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_folder_whose_objects_change_and_vanish_arrives_as_it_is_in_the_end(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        put(f"busy/{name}", b"old")
    monkeypatch.setattr(s3_module, "THREADS", 1)
    client, calls = make_client(), itertools.count(1)

    def change(**_: Any) -> None:
        if next(calls) == 1:
            put("busy/b.txt", b"new")
            make_client().delete_object(Bucket="data", Key="busy/c.txt")

    client.meta.events.register_first("before-call.s3.GetObject", change)
    monkeypatch.setattr("flows.storage.prefixes.make_client", lambda: client)
    target = download_tree("s3://data/busy", tmp_path / "set", progress=False)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {"a.txt": b"old", "b.txt": b"new"}


def test_the_version_of_a_prefix_follows_its_own_objects_only(s3: S3Server) -> None:
    put("mine/a.txt", b"a")
    first = list_versions("s3://data/mine")
    put("mine2/a.txt", b"b")
    assert list_versions("s3://data/mine") == first == list_versions("s3://data/mine/")
    put("mine/a.txt", b"c")
    assert list_versions("s3://data/mine") != first
    assert [name for name, _ in list_versions("s3://data/mine/a.txt")] == ["s3://data/mine/a.txt"]
    with pytest.raises(StorageError, match="does not exist"):
        list_versions("s3://data/min")


@pytest.mark.parametrize("uri", ["s3://", "s3://bucket", "http://x/y", "s3://user:pw@b/"])
def test_a_wrong_address_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match="not an address of the form") as caught:
        head(uri, client=object())
    assert ":pw@" not in str(caught.value)


def test_errors_say_what_to_do_and_hold_no_secret(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        head("s3://data/nothing")
    with pytest.raises(StorageError, match="is empty or does not exist"):
        fetch("s3://data/nothing", tmp_path / "x", progress=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value")
    with pytest.raises(StorageError, match=r"no right|secret key is wrong") as caught:
        head("s3://data/nothing")
    assert "wrong-secret-value" not in str(caught.value)
    monkeypatch.setattr(s3_module, "TRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="Could not connect"):
        head("s3://data/nothing")


def test_missing_keys_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match="Set AWS_ACCESS_KEY_ID"):
        head("s3://data/x")


@pytest.mark.parametrize("uri", ["s3://data/nothing", "s3://nobucket/x"])
def test_what_does_not_exist_is_also_a_missing_file(s3: S3Server, uri: str) -> None:
    with pytest.raises(NotFoundError):
        head(uri)
    assert issubclass(NotFoundError, FileNotFoundError)
