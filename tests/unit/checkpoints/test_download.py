"""Downloads from a local HTTP server: retries, checksums, refusals, several processes."""

from __future__ import annotations

import base64
import errno
import hashlib
import http.server
import multiprocessing
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rfdetr.checkpoints import dinov2, download
from rfdetr.checkpoints.download import resolve_weights
from rfdetr.checkpoints.pretrained import initialise_weights
from rfdetr.config import RFDETRBaseConfig, RFDETRNanoConfig
from rfdetr.errors import DownloadError
from rfdetr.model.network import build_network

NAME = "rf-detr-nano.pth"
BODY = bytes(range(256)) * 20_000  # 5 MB


@dataclass
class Behaviour:
    """What the server does; every answer takes one entry of `cuts` (bytes until it hangs up)."""

    body: bytes = BODY
    headers: dict[str, str] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    status: int = 200
    requests: list[str] = field(default_factory=list)


class Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, behaviour: Behaviour, *args: Any) -> None:
        self.behaviour = behaviour
        super().__init__(*args)

    def do_GET(self) -> None:
        plan = self.behaviour
        plan.requests.append(self.path)
        cut = plan.cuts.pop(0) if plan.cuts else None
        if plan.status != 200:
            self._answer(plan.status, b"no", {}, None)
        else:
            self._answer(200, plan.body, plan.headers, cut)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], cut: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Behaviour]:
    behaviour = Behaviour()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, behaviour))
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("RF_WEIGHTS_URL", f"http://127.0.0.1:{httpd.server_port}/weights/")
    monkeypatch.setenv("RF_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield behaviour
    httpd.shutdown()
    httpd.server_close()


def _cache(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock"))


def test_a_name_is_fetched_once_and_then_cached(
    server: Behaviour, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = resolve_weights(NAME)
    assert path == tmp_path / "cache" / NAME
    assert path.read_bytes() == BODY
    assert resolve_weights(NAME) == path
    assert server.requests == [f"/weights/{NAME}"]
    assert _cache(tmp_path) == [NAME, NAME + ".sha256"]
    assert NAME in capfd.readouterr().err  # the progress bar


def test_an_interrupted_transfer_is_retried(server: Behaviour) -> None:
    server.cuts = [1_000_000, 2_000_000]
    assert resolve_weights(NAME).read_bytes() == BODY
    assert len(server.requests) == 3


def test_a_transfer_that_is_always_interrupted_fails_and_leaves_nothing(
    server: Behaviour, tmp_path: Path
) -> None:
    server.cuts = [1_000_000] * download.ATTEMPTS
    with pytest.raises(DownloadError, match=r"IncompleteRead.*RF_WEIGHTS_URL"):
        resolve_weights(NAME)
    assert _cache(tmp_path) == []
    assert resolve_weights(NAME).read_bytes() == BODY


def test_what_a_killed_process_left_is_removed(server: Behaviour, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f".{NAME}.0123456789ab.tmp").write_bytes(b"part")
    resolve_weights(NAME)
    assert _cache(tmp_path) == [NAME, NAME + ".sha256"]


MD5 = {"x-goog-hash": f"crc32c=AAAAAA==,md5={base64.b64encode(bytes(16)).decode()}"}


def test_content_that_differs_from_the_checksum_of_the_server_is_discarded(
    server: Behaviour, tmp_path: Path
) -> None:
    server.headers |= MD5
    with pytest.raises(DownloadError, match="does not match the MD5"):
        resolve_weights(NAME)
    assert _cache(tmp_path) == []


def test_a_matching_checksum_of_the_server_is_accepted(server: Behaviour) -> None:
    digest = base64.b64encode(hashlib.md5(BODY).digest()).decode()
    server.headers |= {"x-goog-hash": f"crc32c=AAAAAA==,md5={digest}"}
    assert resolve_weights(NAME).read_bytes() == BODY


def test_a_known_digest_is_required_from_every_server(
    server: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(download.SHA256, NAME, hashlib.sha256(BODY).hexdigest())
    server.body = BODY[::-1]
    with pytest.raises(DownloadError, match=r"SHA-256 .* not .*published.* discarded"):
        resolve_weights(NAME)
    assert _cache(tmp_path) == []
    server.body = BODY
    path = resolve_weights(NAME)
    assert _cache(tmp_path) == [NAME]
    path.write_bytes(b"other")
    with pytest.raises(DownloadError, match=f"SHA-256 .* Delete .*{NAME}"):
        resolve_weights(NAME)


def test_the_digest_of_the_first_download_is_required_from_then_on(
    server: Behaviour, tmp_path: Path
) -> None:
    path = resolve_weights(NAME)
    record = tmp_path / "cache" / (NAME + ".sha256")
    assert record.read_text() == f"{hashlib.sha256(BODY).hexdigest()}  {NAME}\n"
    path.write_bytes(b"replaced")
    with pytest.raises(
        DownloadError, match=rf"recorded in .*{record.name}.*replaced it on purpose"
    ):
        resolve_weights(NAME)
    path.unlink()
    server.body = BODY[::-1]
    with pytest.raises(DownloadError, match=r"SHA-256 .* not .*discarded"):
        resolve_weights(NAME)
    assert _cache(tmp_path) == [record.name]
    record.unlink()
    assert resolve_weights(NAME).read_bytes() == server.body


def test_a_file_that_the_user_put_into_the_cache_is_recorded(
    server: Behaviour, tmp_path: Path
) -> None:
    path = tmp_path / "cache" / NAME
    path.parent.mkdir()
    path.write_bytes(b"mine")
    assert resolve_weights(NAME) == path
    assert _cache(tmp_path) == [NAME, NAME + ".sha256"]
    assert server.requests == []


def test_a_full_disk_is_named(server: Behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(url: str, part: Path, name: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_fetch", full)
    with pytest.raises(DownloadError, match=r"No space left.*RF_HOME .* enough space"):
        resolve_weights(NAME)


@pytest.mark.parametrize("status", [404, 403, 500])
def test_an_error_of_the_server_is_reported_at_once(
    server: Behaviour, tmp_path: Path, status: int
) -> None:
    server.status = status
    with pytest.raises(DownloadError, match=rf"{status}.*put the file at .*{NAME}.*RF_WEIGHTS_URL"):
        resolve_weights(NAME)
    assert len(server.requests) == 1
    assert _cache(tmp_path) == []


def test_offline_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RF_WEIGHTS_URL", "http://127.0.0.1:9/")
    begin = time.monotonic()
    with pytest.raises(DownloadError, match="refused"):
        resolve_weights(NAME)
    assert time.monotonic() - begin < 5


def test_a_silent_server_does_not_hang(server: Behaviour, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(download, "TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RF_WEIGHTS_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(DownloadError, match="timed out"):
            resolve_weights(NAME)


def test_a_local_file_is_used_as_it_is(server: Behaviour, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"mine")
    assert resolve_weights(NAME).read_bytes() == b"mine"
    assert server.requests == []


def test_unknown_names_list_the_published_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"Did you mean rf-detr-small\.pth.*rf-detr-base"):
        resolve_weights("rf-detr-smal.pth")


def test_a_cache_folder_that_cannot_be_made_is_named(
    server: Behaviour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RF_HOME", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match="Set RF_HOME"):
        resolve_weights(NAME)


def test_only_http_mirrors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RF_WEIGHTS_URL", "file:///etc")
    with pytest.raises(DownloadError, match="http"):
        resolve_weights(NAME)


def test_every_default_of_a_config_is_a_published_name() -> None:
    from rfdetr.config import MODEL_CONFIGS

    assert {c.model_fields["pretrain_weights"].default for c in MODEL_CONFIGS.values()} <= set(
        download.PUBLISHED
    )


def test_processes_share_one_download(server: Behaviour) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=resolve_weights, args=(NAME,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(server.requests) == 1


def test_a_default_name_without_network_warns_and_an_explicit_one_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RF_WEIGHTS_URL", "http://127.0.0.1:9/")
    default = RFDETRNanoConfig()
    network = build_network(default)
    with pytest.warns(UserWarning, match=r"rf-detr-nano\.pth are not available: .*refused"):
        assert initialise_weights(network, default) is None
    explicit = RFDETRNanoConfig(pretrain_weights=NAME)
    with pytest.raises(DownloadError):
        initialise_weights(network, explicit)


def test_dinov2_is_skipped_offline_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    config = RFDETRBaseConfig(pretrain_weights=None, group_detr=1)
    network = build_network(config)
    begin = time.monotonic()
    with pytest.warns(UserWarning, match="DINOv2 encoder weights .* not available"):
        assert initialise_weights(network, config) is None
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("encoder", ["dinov2_windowed_small", "dinov2_registers_windowed_small"])
def test_timm_weights_fill_every_encoder_tensor(
    encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    state = timm.create_model(dinov2.TIMM_NAMES[encoder], num_classes=0).state_dict()
    monkeypatch.setattr(dinov2, "_download", lambda name: state)
    config = RFDETRBaseConfig(pretrain_weights=None, group_detr=1, encoder=encoder)
    with torch.device("meta"):
        network = build_network(config)
    network = network.to_empty(device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = initialise_weights(network, config)
    assert report is not None
    assert (report.missing, report.unexpected) == ((), ())
    loaded = network.state_dict()
    assert all(torch.equal(loaded[n], value) for n, value in dinov2.encoder_weights(state).items())


def test_only_the_native_grid_takes_dinov2() -> None:
    assert dinov2.fits(RFDETRBaseConfig(pretrain_weights=None))
    assert not dinov2.fits(RFDETRBaseConfig(pretrain_weights=None, encoder_dim=192))
    assert not dinov2.fits(RFDETRNanoConfig(pretrain_weights=None))
