"""Messages reach a real HTTP listener, carry no secrets, and never fail a run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from flows.config.environment import Environment
from flows.orchestration.notify import notify


@pytest.fixture
def listener() -> Iterator[tuple[str, list[dict[str, str]]]]:
    received: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            received.append(json.loads(self.rfile.read(length)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", received
    server.shutdown()
    server.server_close()


def test_webhook_gets_the_message_without_secrets(
    listener: tuple[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, received = listener
    monkeypatch.setenv("RFDETR_NOTIFY_URL", address)
    body = "pull from s3://key:topsecret@host/bucket failed"
    assert notify(Environment.read(), "retrain failed", body, {"run": "night"}) == ["webhook"]
    assert received[0]["subject"] == "retrain failed"
    assert received[0]["run"] == "night"
    assert "topsecret" not in json.dumps(received)


def test_unreachable_channels_are_logged_and_skipped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RFDETR_NOTIFY_URL", "http://127.0.0.1:9/hook")
    assert notify(Environment.read(), "a", "b") == []
    monkeypatch.setenv("RFDETR_NOTIFY_URL", "file:///etc/passwd")
    assert notify(Environment.read(), "a", "b") == []
    assert "https://" in caplog.text


def test_nothing_is_sent_when_nothing_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RFDETR_NOTIFY_URL", raising=False)
    monkeypatch.delenv("RFDETR_NOTIFY_BLOCK", raising=False)
    assert notify(Environment.read(), "a", "b") == []


def test_secrets_in_nested_facts_are_masked(
    listener: tuple[str, list[dict[str, str]]],
) -> None:
    address, received = listener
    env = Environment.read({"RFDETR_NOTIFY_URL": address})
    secret = "https://bot:Zq8vX2mN4pL7rT1w@host/x"
    notify(env, "subject", "text", {"text": "other", "deep": {"list": [secret]}})
    (sent,) = received
    assert "Zq8vX2mN4pL7rT1w" not in json.dumps(sent)
    assert "***@host" in json.dumps(sent)
    assert sent["text"] == "text"
