"""Python's garbage collector, and imports, in processes that import much and live briefly.

With torch, Lightning and MLflow imported there are about a million objects. The collections at exit
take a quarter of the processor time of such a process, those during the imports a tenth.
"""

from __future__ import annotations

import atexit
import gc
import sys

OBJECTS = 50_000  # new ones before a collection, instead of 700


def exit_quickly() -> None:
    """Look for no garbage when the process ends. Repeating the call is harmless.

    An open file that only a reference cycle holds is then not flushed, so files must be closed.
    """
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)


def without_tables() -> None:
    """Make pandas and pyarrow unavailable to this process, for commands that ask the registry.

    MLflow imports them, if it can, for tables that we do not track, and Mako's highlighting comes
    with its migrations: together a fifth of such a command.
    """
    for name in ("pandas", "pyarrow", "mako.ext.pygmentplugin"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type] # documented: import fails


def collect_rarely() -> None:
    """Look for garbage less often. Not for trainers, whose garbage may hold memory of a GPU."""
    gc.set_threshold(OBJECTS)
    exit_quickly()
