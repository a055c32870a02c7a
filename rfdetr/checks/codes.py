"""Finding codes: severity, action, meaning, advice and repair of each, read from codes.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "info"]
Action = Literal["fix", "repair", "decide", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
ACTIONS: tuple[Action, ...] = ("fix", "repair", "decide", "info")


class CodeInfo(NamedTuple):
    """One kind of finding, as codes.toml explains it; `repair` is empty where --fix has none."""

    severity: Severity
    action: Action
    meaning: str
    advice: str
    repair: str = ""


def _read_table() -> dict[str, CodeInfo]:
    text = Path(__file__).with_name("codes.toml").read_text(encoding="utf-8")
    return {code: CodeInfo(**entry) for code, entry in tomllib.loads(text).items()}


CODES = _read_table()
