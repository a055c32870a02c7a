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

from infra.screenshots import Page, problem_of, take, visible_text
from infra.services import StackError

GOOD = "<html><body><h1>nano trees</h1><p style='background:red'>loss, 0 errors</p></body></html>"
LATE = "<html><body>nano trees<script>setTimeout(() => {{ {} }}, 3000)</script></body></html>"
PAGES = {
    "good": GOOD,
    "late error": LATE.format("document.body.innerText = 'Oops! Something went wrong'"),
    "late nothing": LATE.format("document.body.innerText = ''"),
    "other": GOOD.replace("nano trees", "a login"),
    "blank": "<html><body style='color:white'>nano trees</body></html>",
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
    assert problem_of(page, visible_text(f"{GOOD}<script>'Page not found'</script>")) is None
    assert "does not show 'nano trees'" in str(problem_of(page, "Welcome"))
    assert problem_of(page, visible_text("<html><style>a</style></html>")) == "is empty"


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


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_only_the_page_itself_becomes_a_picture(address: str, tmp_path: Path) -> None:
    target = tmp_path / "page.png"
    for name, said in {
        "late error": "shows an error ('Something went wrong')",
        "late nothing": "is empty",
        "other": "does not show",
        "blank": "empty picture",
    }.items():
        with pytest.raises(StackError) as raised:
            take(Page(f"{address}/{name}.html", "nano trees"), target)
        assert said in str(raised.value), name
    with pytest.raises(StackError, match="shows an error"):
        take(Page(f"{address}/missing.html", "nano trees"), target)
    assert not target.exists()
    take(Page(f"{address}/good.html", "nano trees", size=(400, 300)), target)
    with Image.open(target) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 400 and (pixels == (255, 0, 0)).all(axis=-1).any()
