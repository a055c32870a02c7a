"""What an operating point is chosen for."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from rfdetr.errors import InputError


class Target(NamedTuple):
    """What a threshold is chosen for: the best F1, or a precision or recall of at least `least`."""

    kind: Literal["f1", "precision", "recall"]
    least: float = 0.0


def parse_target(text: str) -> Target:
    """The target `f1`, `precision>=0.95` or `recall>=0.9`. Raises InputError."""
    if text.strip() == "f1":
        return Target("f1")
    found = re.fullmatch(r"\s*(precision|recall)\s*>=\s*(0?\.\d+|[01](?:\.\d*)?)\s*", text)
    if not found or not 0 < float(found[2]) <= 1:
        raise InputError(
            "must be f1, or precision or recall with a value above 0 and up to 1, such as "
            "'precision>=0.95'"
        )
    return Target("precision" if found[1] == "precision" else "recall", float(found[2]))
