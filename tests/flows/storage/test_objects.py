"""Transfers with a real S3 server: interruptions, checksums, folders, errors without secrets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from flows.storage import objects
from flows.storage import s3 as s3_module
from flows.storage.objects import download, upload
from flows.storage.prefixes import download_tree, fetch, inside, upload_tree
from flows.storage.s3 import (
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
    file.write_bytes(os.urandom(23 * MIB))
    return file


def test_a_file_comes_back_equal_and_carries_its_checksum(s3: S3Server, tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(os.urandom(12345))
    digest = upload(file, "s3://data/x/a.bin", progress=False)
    assert head("s3://data/x/a.bin") == {
        "size": 12345,
        "sha256": digest,
        "etag": head("s3://data/x/a.bin")["etag"],
    }
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
    assert head("s3://data/up.bin")["sha256"] == sha256_file(big)
    assert sha256_file(download("s3://data/up.bin", tmp_path / "again")) == sha256_file(big)
    idle = Faulty("CreateMultipartUpload")
    upload(big, "s3://data/up.bin", progress=False, client=idle.client)
    assert idle.calls == 0


def test_an_object_that_changes_during_its_download_is_refused(
    s3: S3Server, tmp_path: Path, big: Path
) -> None:
    upload(big, "s3://data/c.bin", progress=False)
    client, other = make_client(), make_client()
    content = os.urandom(23 * MIB)

    def change(**_: Any) -> None:
        other.put_object(Bucket="data", Key="c.bin", Body=content)

    client.meta.events.register_first("before-call.s3.GetObject", change)
    with pytest.raises(StorageError):
        download("s3://data/c.bin", tmp_path / "out" / "c", progress=False, client=client)
    assert list((tmp_path / "out").iterdir()) == []


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
                return {"ContentLength": 0, "ETag": "e", "Metadata": {}}
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


@pytest.mark.parametrize("name", ["../out.txt", "a/../../out.txt", "/etc/out.txt"])
def test_a_name_from_outside_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="leads out of"):
        inside(tmp_path / "set", name)
    assert inside(tmp_path / "set", "a/b.txt") == tmp_path / "set" / "a" / "b.txt"
