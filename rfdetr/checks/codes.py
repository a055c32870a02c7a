"""Finding codes: default severity, meaning, advice and automatic repair, read from codes.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


class CodeInfo(NamedTuple):
    """One kind of finding. `repair` is empty where only the user can decide what to do."""

    severity: Severity
    meaning: str
    advice: str
    repair: str = ""


def _read_table() -> dict[str, CodeInfo]:
    text = Path(__file__).with_name("codes.toml").read_text(encoding="utf-8")
    return {code: CodeInfo(**entry) for code, entry in tomllib.loads(text).items()}


CODES = _read_table()
