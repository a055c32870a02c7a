"""A file of records that a background thread sends on, so that a slow receiver delays nobody."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rfdetr.files import write_text_atomic

Record = dict[str, Any]
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0

_writing = threading.Lock()


class Journal:
    """Records as JSON lines, and beside them `<name>.state.json`: bytes sent, receiver's ids."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def state_path(self) -> Path:
        return self.path.with_suffix(".state.json")

    def append(self, record: Record) -> None:
        """Add one record; it survives the process once this returns."""
        with _writing:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")

    def state(self) -> Record:
        """What the sender noted: `sent` bytes and anything of its own."""
        if not self.state_path.is_file():
            return {"sent": 0}
        state: Record = json.loads(self.state_path.read_text(encoding="utf-8"))
        return state

    def note(self, **values: Any) -> None:
        """Add to the state."""
        write_text_atomic(self.state_path, json.dumps(self.state() | values) + "\n")

    def pending(self) -> tuple[list[Record], int]:
        """Complete records that were not sent yet, and the byte position after them."""
        if not self.path.is_file():
            return [], 0
        with open(self.path, "rb") as stream:
            stream.seek(self.state()["sent"])
            data = stream.read()
            end = data.rfind(b"\n") + 1
            position = stream.tell() - len(data) + end
        return [json.loads(line) for line in data[:end].splitlines()], position


class Sender(threading.Thread):
    """Sends what is pending with `send`, again and again until `drain` or the process ends.

    A failure is warned about once and repeated after a pause that grows to 30 seconds.
    """

    def __init__(self, name: str, send: Callable[[], None]) -> None:
        super().__init__(daemon=True, name=f"{name}-sender")
        self._send = send
        self._label = name
        self._wake = threading.Event()
        self._idle = threading.Event()
        self._warned = False

    def notify(self) -> None:
        """There is something new to send."""
        self._idle.clear()
        self._wake.set()
        if not self.is_alive():
            self.start()

    def drain(self, seconds: float) -> bool:
        """Wait until everything is sent, at most `seconds`."""
        return not self.is_alive() or self._idle.wait(seconds)

    def run(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            self._wake.wait()
            self._wake.clear()
            try:
                self._send()
                pause = FIRST_PAUSE_S
                if not self._wake.is_set():
                    self._idle.set()
            except Exception as error:  # noqa: BLE001 - clients of servers raise anything
                self._complain(error)
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                self._wake.set()

    def _complain(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._label} cannot be reached ({error}). Training goes on; what is logged is "
                "kept and sent when it answers again.",
                UserWarning,
                stacklevel=2,
            )
