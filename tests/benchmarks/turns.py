"""This checkout and another one, measured in turns by the same script."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def in_turns(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Run the script `args.rounds` times on this checkout and on `args.tree`; yields its results.

    The script prints one JSON object. Its other arguments are passed on.
    """
    own = str(Path(__file__).parents[2])
    place = sys.argv.index("--tree")
    command = [sys.executable, *sys.argv[:place], *sys.argv[place + 2 :]]
    for _ in range(args.rounds):
        new, old = (
            json.loads(
                subprocess.check_output(
                    command,
                    text=True,
                    stderr=subprocess.DEVNULL,
                    env=os.environ | {"PYTHONPATH": tree},
                ).splitlines()[-1]
            )
            for tree in (own, args.tree)
        )
        yield new, old
