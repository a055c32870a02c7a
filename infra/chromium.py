"""Pages in headless Chromium, as a reader sees them: visible text and pictures.

Chromium is driven through its DevTools protocol, in real time: with `--virtual-time-budget`, pages
give up requests that a loaded server has not answered yet, and show that as an error.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from flows.core.process import signal_group
from infra.settings import HOST, StackError

ATTEMPTS = 3  # one lost request leaves an error on a page until it is loaded again
PAGE_SECONDS = 90.0  # per attempt
CALM_SECONDS = 6.0  # the text no longer changes: the data has arrived
START_SECONDS = 60.0
ERRORS = re.compile(
    r"\bERR_[A-Z_]+|code: 404|Traceback \(most recent|RESOURCE_DOES_NOT_EXIST"
    r"|(?i:page not found|something went wrong|(internal|api) (server )?error|404 not found)"
    r"|(?i:can.t (be reached|load))"
    r"|(?i:50[0234] (bad|service|gateway|internal)|(failed|unable) to (fetch|load)|does not exist)"
    r"|(?i:(run|model|version|experiment)[^.]{0,60} (was )?not found)"
)


class Page(NamedTuple):
    """An address, a text that the page must show, the size of the window, and what is kept.

    `script` prepares the page in JavaScript, for example opens a section. `crop` is left, top,
    right, bottom.
    """

    url: str
    shows: str
    size: tuple[int, int] = (1280, 900)
    crop: tuple[int, int, int, int] | None = None
    script: str = ""


def problem_of(page: Page, text: str) -> str | None:
    """What is wrong with the visible text of a page, as the rest of a sentence."""
    if found := ERRORS.search(text):
        return f"shows an error ({found[0]!r})"
    if not text.strip():
        return "is empty"
    return None if page.shows in text else f"does not show {page.shows!r}"


class Tab:
    """The one tab of a browser."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)

    def picture(self, page: Page) -> bytes:
        """The page as PNG. Raises StackError if it shows an error, nothing, or another page."""
        width, height = page.size
        view = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **view)
        for attempt in range(ATTEMPTS):
            problem = self._load(page)
            if problem is None and page.script:
                self._evaluate(page.script)
                problem = self._settle(page)
            if problem is None:
                shot = base64.b64decode(self._call("Page.captureScreenshot")["data"])
                problem = problem_of(page, self._text())  # it may have failed meanwhile
            if problem is None:
                return shot
            time.sleep(attempt)
        raise StackError(f"{page.url} {problem}; no picture was taken")

    def _load(self, page: Page) -> str | None:
        answer = self._call("Page.navigate", url=page.url)
        if text := answer.get("errorText"):
            return f"cannot be loaded ({text})"
        return self._settle(page)

    def _settle(self, page: Page) -> str | None:
        """Wait for the page to stop changing; what is wrong with it then."""
        text, since, end = "", time.monotonic(), time.monotonic() + PAGE_SECONDS
        while (now := time.monotonic()) < end:
            time.sleep(0.5)
            if (seen := self._text()) != text:
                text, since = seen, now
            elif now - since > CALM_SECONDS and (page.shows in text or ERRORS.search(text)):
                break
        return problem_of(page, text)

    def _text(self) -> str:
        """What a reader sees: innerText leaves out everything that is hidden."""
        return " ".join(str(self._evaluate("document.body?.innerText ?? ''")).split())

    def _evaluate(self, script: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=script, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise StackError(f"Chromium: {answer['exceptionDetails']} in {script}")
        return answer["result"].get("value")

    def _call(self, method: str, **params: object) -> dict[str, Any]:
        """Send a command and return its result; events in between are ignored."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self._connection.recv(timeout=PAGE_SECONDS))
            if answer.get("id") == number:
                if "error" in answer:
                    raise StackError(f"Chromium: {method}: {answer['error']['message']}")
                return dict(answer["result"])


@contextlib.contextmanager
def browser() -> Iterator[Tab]:
    """A browser with one tab: `chromium` on PATH, or RFDETR_CHROMIUM.

    Raises StackError if it is missing or does not answer.
    """
    program = os.environ.get("RFDETR_CHROMIUM") or shutil.which("chromium")
    if program is None:
        raise StackError("Chromium is not installed; install it or set RFDETR_CHROMIUM to its path")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [
            f"--user-data-dir={profile}",
            "--blink-settings=preferredColorScheme=1",  # light, whatever the desktop prefers
            "--remote-debugging-port=0",
            "about:blank",
        ]
        quiet = subprocess.DEVNULL
        with subprocess.Popen(
            command, stdout=quiet, stderr=quiet, start_new_session=True
        ) as process:
            try:
                address = _tab_address(Path(profile), process)
                with connect(address, max_size=None, proxy=None) as connection:
                    yield Tab(connection)
            except (OSError, httpx.HTTPError, WebSocketException) as error:
                raise StackError(f"Chromium does not answer: {error}") from error
            finally:
                signal_group(process.pid, signal.SIGKILL)


def _tab_address(profile: Path, process: subprocess.Popen[bytes]) -> str:
    """The address of the tab; Chromium writes its port to a file of the profile."""
    file, end = profile / "DevToolsActivePort", time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if file.exists() and (lines := file.read_text().splitlines()):
            tabs = httpx.get(f"http://{HOST}:{lines[0]}/json/list", trust_env=False).json()
            for tab in tabs:
                if tab["type"] == "page":
                    return str(tab["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise StackError(f"Chromium does not start (exit status {process.poll()})")
