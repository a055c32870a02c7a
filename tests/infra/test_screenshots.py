"""Pictures of pages: what a page is for is on them, and error pages are refused."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra.chromium import Page, problem_of
from infra.screenshots import take
from infra.settings import StackError
from tests.flows.mlflow_fixtures import free_port

TEXT = "<h1>nano trees</h1><p style='background:red'>loss, 0 errors</p>"
ERROR = "Oops. Something went wrong."
HIDDEN = (
    f"<template>{ERROR}</template><div style='display:none'>{ERROR}</div><!-- {ERROR} -->"
    f"<script>'{ERROR}'</script><noscript>{ERROR}</noscript>"
)
LATE = TEXT + "<script>setTimeout(() => {{ document.body.innerText = '{}' }}, 3000)</script>"
ONCE = (
    TEXT + "<script>if (!sessionStorage.known) document.body.append('{}'); "
    "sessionStorage.known = 1</script>"
)
PAGES = {
    "good": TEXT + HIDDEN,
    "once": ONCE.format(ERROR),
    "late error": LATE.format(ERROR),
    "late nothing": LATE.format(""),
    "other": TEXT.replace("nano trees", "a login"),
    "blank": "<body style='color:white'>nano trees",
}
REFUSED = {
    "late error": r"shows an error \('Something went wrong'\)",
    "late nothing": "is empty",
    "other": "does not show 'nano trees'",
    "blank": "empty picture",
    "missing": "shows an error",
}


@pytest.mark.parametrize(
    "text",
    [
        "This site can\u2019t be reached ERR_CONNECTION_REFUSED",
        "Page Not Found The page you are looking for",
        "404 Not Found nginx",
        "502 Bad Gateway",
        "RESOURCE_DOES_NOT_EXIST: nano trees",
        "Run 'nano trees' not found",
        "Flow run does not exist",
        "Failed to fetch nano trees",
        "Can't load run details",
        "Internal Server Error",
        "Traceback (most recent call last): nano trees",
    ],
)
def test_errors_are_recognised(text: str) -> None:
    assert "shows an error" in str(problem_of(Page("http://x", "nano trees"), f"nano trees {text}"))


def test_an_ordinary_page_is_not_an_error() -> None:
    page = Page("http://x", "nano trees")
    assert problem_of(page, "nano trees loss, 0 errors") is None
    assert "does not show 'nano trees'" in str(problem_of(page, "Welcome"))
    assert problem_of(page, " ") == "is empty"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "site").mkdir()
    for name, text in PAGES.items():
        (tmp_path / f"site/{name}.html").write_text(text)
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site")
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.chromium.PAGE_SECONDS", 10.0)


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")


@pytest.mark.slow
@needs_chromium
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("name", "said"), REFUSED.items())
def test_a_page_with_a_problem_is_refused(
    address: str, tmp_path: Path, name: str, said: str
) -> None:
    target = tmp_path / "page.png"
    with pytest.raises(StackError, match=said):
        take(Page(f"{address}/{name}.html", "nano trees"), target)
    assert not target.exists()


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("name", ["good", "once"])
def test_a_page_becomes_a_picture(address: str, tmp_path: Path, name: str) -> None:
    """Hidden text is not an error, and an error that is gone after loading again is none."""
    target = tmp_path / "page.png"
    green = "document.querySelector('h1').style.background = 'lime'"
    take(Page(f"{address}/{name}.html", "nano trees", size=(400, 300), script=green), target)
    with Image.open(target) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (300, 400, 3)
    for colour in ((255, 0, 0), (0, 255, 0)):
        assert (pixels == colour).all(axis=-1).sum() > 1000


@pytest.mark.slow
@needs_chromium
def test_a_server_that_is_down_is_told(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="ERR_CONNECTION_REFUSED"):
        take(Page(f"http://127.0.0.1:{free_port()}/", "nano trees"), tmp_path / "page.png")
