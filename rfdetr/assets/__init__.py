"""Class lists under the import path of the public package."""

from __future__ import annotations

from typing import Any

from rfdetr.compat import absent


def __getattr__(name: str) -> Any:
    raise absent(__name__, name)
