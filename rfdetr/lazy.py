"""Packages whose names are loaded from their modules when they are first used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from rfdetr.compat import absent


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package; `homes` has the module inside it that defines each name."""

    def load(name: str) -> Any:
        if name not in homes:
            raise absent(package, name)
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return load
