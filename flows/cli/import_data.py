"""`rfdetr-pipeline import`: a dataset in a foreign format as a COCO export with splits."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from flows.config.environment import Environment
from flows.core.errors import OK

FORMATS = ("coco", "cvat", "voc", "labelme", "label-studio", "yolo")  # without importing readers


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder or zip of the export")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="new folder")
    parser.add_argument(
        "--format", choices=FORMATS, help="the format to read (default: what the files are)"
    )
    split_options(parser)
    parser.add_argument("--force", action="store_true", help="replace FOLDER if it exists")


def split_options(parser: argparse.ArgumentParser) -> None:
    """The options about splitting a dataset."""
    parser.add_argument(
        "--split",
        metavar="TRAIN/VALID/TEST",
        help="split again in these shares (default: the splits of the source, else 0.8/0.1/0.1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")


def import_command(options: argparse.Namespace) -> int:
    """Convert SOURCE, print what was read and skipped, and name the next command."""
    from rfdetr.importers import Shares, import_dataset

    report = import_dataset(
        options.source,
        options.to,
        format_name=options.format,
        shares=Shares.parse(options.split) if options.split else None,
        seed=options.seed,
        replace_target=options.force,
        cache_dir=Environment.read().state_dir / "checks",
        progress=sys.stderr.isatty(),
    )
    print(report.to_text())
    print(f"next: rfdetr-pipeline init {shlex.quote(str(options.to))}")
    return OK
