"""The copy of the resume state on S3: intact at any moment, skipped where it is damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.fit_job.mirror import Mirror
from flows.storage import objects
from flows.storage.objects import download
from flows.storage.s3 import StorageError, make_client
from rfdetr.files import write_text_atomic
from tests.flows.servers import S3Server


def test_the_state_travels_to_s3_and_back(s3: S3Server, tmp_path: Path) -> None:
    here = tmp_path / "one" / "abc"
    here.mkdir(parents=True)
    (here / "last.ckpt").write_bytes(b"weights")
    (here / "fit.log").write_text("stays here")
    mirror = Mirror(here, "s3://data/state")
    with mirror:
        (here / "run.json").write_text("{}")
    there = tmp_path / "two" / "abc"
    there.mkdir(parents=True)
    Mirror(there, "s3://data/state/").fetch()
    assert sorted(path.name for path in there.iterdir()) == ["last.ckpt", "run.json"]
    assert (there / "last.ckpt").read_bytes() == b"weights"


@pytest.fixture
def sent(s3: S3Server, tmp_path: Path) -> str:
    """The address of a state of which two checkpoints were sent; the folder is `tmp_path/key`."""
    folder, url = tmp_path / tmp_path.name, f"s3://data/{tmp_path.name}"
    folder.mkdir()
    mirror = Mirror(folder, url)
    for content in (b"first", b"second"):
        write_text_atomic(folder / "last.ckpt", content.decode())
        (folder / "run.json").write_text("{}")
        mirror.send()
    return url


def fetched(url: str, tmp_path: Path) -> dict[str, bytes]:
    there = tmp_path / "two" / tmp_path.name
    there.mkdir(parents=True, exist_ok=True)
    Mirror(there, url).fetch()
    return {path.name: path.read_bytes() for path in there.iterdir()}


def damage(url: str, *names: str) -> None:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    for name in names:
        make_client().put_object(
            Bucket=bucket, Key=f"{key}/{key}/{name}", Body=b"x", Metadata={"sha256": "0" * 64}
        )


def test_the_newest_checkpoint_comes_back(sent: str, tmp_path: Path) -> None:
    assert fetched(sent, tmp_path) == {"last.ckpt": b"second", "run.json": b"{}"}


def test_a_damaged_copy_gives_way_to_the_one_before(
    sent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(sent, "last.0.ckpt")
    assert fetched(sent, tmp_path) == {"last.ckpt": b"first", "run.json": b"{}"}
    assert "does not match its SHA-256" in capsys.readouterr().err


def test_without_an_intact_checkpoint_the_training_starts_from_scratch(
    sent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(sent, "last.0.ckpt", "last.1.ckpt")
    assert fetched(sent, tmp_path) == {}
    assert "starts from scratch" in capsys.readouterr().err


def test_an_interrupted_fetch_starts_over(
    sent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(uri: str, target: Path, *, progress: bool) -> Path:
        if uri.endswith("run.json"):
            raise KeyboardInterrupt
        return download(uri, target, progress=progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("flows.fit_job.mirror.download", cut)
        fetched(sent, tmp_path)
    assert fetched(sent, tmp_path) == {"last.ckpt": b"second", "run.json": b"{}"}


def test_what_is_sent_does_not_change_while_it_is_read(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training appends to its files and replaces its weights between hash and transfer."""
    folder, url = tmp_path / tmp_path.name, f"s3://data/{tmp_path.name}"
    folder.mkdir()
    for name in ("last.ckpt", "metrics.csv", "journal.jsonl"):
        (folder / name).write_text("old")
    real = objects.sha256_file

    def slow(path: Path) -> str:
        digest = real(path)
        write_text_atomic(folder / "last.ckpt", "newer")
        for name in ("metrics.csv", "journal.jsonl"):
            with open(folder / name, "a") as stream:
                stream.write("more")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(objects, "sha256_file", slow)
        Mirror(folder, url).send()
    found = fetched(url, tmp_path)
    assert set(found) == {"last.ckpt", "metrics.csv", "journal.jsonl"}
    Mirror(folder, url).send()
    shutil.rmtree(tmp_path / "two")
    assert fetched(url, tmp_path)["last.ckpt"] == b"newer"


def test_an_unreachable_s3_server_never_makes_a_training_start_from_scratch(
    sent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("flows.storage.s3.TRIES", 1)
    with pytest.raises(StorageError, match="Start again when it can be read"):
        fetched(sent, tmp_path)


def test_an_absent_s3_server_does_not_stop_the_training(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("flows.storage.s3.TRIES", 1)
    (tmp_path / "last.ckpt").write_bytes(b"x")
    with Mirror(tmp_path, "s3://data/state"):
        pass
