"""JSON files of strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec


def read_json(path: Path) -> Any:
    """Plain data, or None if the file cannot be read or is not JSON."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        return msgspec.json.decode(data)
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
        return None
