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


def without_pandas() -> None:
    """Make pandas unavailable to this process, for commands that only ask the registry.

    MLflow imports it, if it can, for tables that we do not track: a sixth of such a command.
    """
    sys.modules.setdefault("pandas", None)  # type: ignore[arg-type] # documented: import fails


def collect_rarely() -> None:
    """Look for garbage less often. Not for trainers, whose garbage may hold memory of a GPU."""
    gc.set_threshold(OBJECTS)
    exit_quickly()
