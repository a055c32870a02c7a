"""`python -m rfdetr.checks DATASET`: check a dataset from the command line."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from rich.console import Console

from rfdetr.checks.check import check_dataset
from rfdetr.checks.codes import CODES
from rfdetr.checks.dataset_report import DatasetReport
from rfdetr.checks.html import write_html
from rfdetr.checks.markdown import to_markdown
from rfdetr.checks.options import CheckConfig
from rfdetr.checks.repair.copy import EVERY_FINDING, plan_repair, repair_dataset
from rfdetr.config import MODEL_CONFIGS, ModelConfig
from rfdetr.errors import RFDETRError
from rfdetr.files import write_text_atomic

EXIT_OK, EXIT_ERRORS, EXIT_UNUSABLE = 0, 1, 2

console = Console(highlight=False, soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    """Arguments of the command."""
    found = argparse.ArgumentParser(
        prog="python -m rfdetr.checks",
        description="Find every defect of a dataset. Exit status 0: no errors; 1: errors; 2: the "
        "dataset could not be checked or repaired. With --fix it is the status of the copy, and 1 "
        "also if the copy is not better. Nothing is written to the dataset.",
    )
    found.add_argument("dataset", nargs="?", help="dataset folder")
    found.add_argument("--format", choices=("roboflow", "coco", "yolo"), default="roboflow")
    found.add_argument("--model", choices=sorted(MODEL_CONFIGS), default="nano")
    found.add_argument("--resolution", type=int, help="side of the model input in pixels")
    found.add_argument("--previous", metavar="REPORT|DATASET", help="older version to compare with")
    found.add_argument("--out", metavar="DIR", help="folder for report.json, .md and .html")
    found.add_argument("--fix-plan", action="store_true", help="list what --fix would repair")
    found.add_argument("--fix", metavar="OUT_DIR", help="write a repaired copy to this new folder")
    found.add_argument(
        "--allow-drop",
        action="store_true",
        help="with --fix: drop more than 5 %% of a split, duplicate boxes and leaked images too",
    )
    found.add_argument("--silence", metavar="CODE", action="append", default=[])
    found.add_argument("--severity", metavar="CODE=LEVEL", action="append", default=[])
    found.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set a threshold of CheckConfig",
    )
    found.add_argument("--annotations-only", action="store_true", help="do not open images")
    found.add_argument("--workers", type=int, help="processes (default: all cores)")
    found.add_argument("--cache", metavar="DIR", help="cache folder (default: the user's)")
    found.add_argument("--no-progress", action="store_true")
    found.add_argument("--list-codes", action="store_true", help="print every code and stop")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; a failure prints one readable message."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = parser().parse_args(arguments)
    if options.list_codes:
        for code, info in CODES.items():
            repair = f" [--fix: {info.repair}]" if info.repair else ""
            console.print(f"{code:24} {info.severity:8} {info.meaning}{repair}", markup=False)
        return EXIT_OK
    if options.dataset is None:
        parser().error("the dataset folder is required")
    try:
        return _run(options)
    except ValidationError as error:
        return _fail("; ".join(map(_problem, error.errors())))
    except (RFDETRError, ValueError, OSError) as error:
        return _fail(str(error))


def _problem(error: ErrorDetails) -> str:
    """The field, its value and what is wrong with it."""
    field = ".".join(map(str, error["loc"]))
    return f"{field}={error['input']}: {error['msg']}" if field else error["msg"]


def _fail(text: str) -> int:
    sys.stderr.write(f"error: {text}\n")
    return EXIT_UNUSABLE


def _run(options: argparse.Namespace) -> int:
    _require_outside(options)
    check = partial(
        check_dataset,
        dataset_file=options.format,
        config=_config(options),
        model_config=_model(options),
        workers=options.workers,
        cache_dir=options.cache,
        progress=not options.no_progress,
    )
    report = check(options.dataset, previous=options.previous)
    _print_summary(report)
    if options.out:
        out = Path(options.out)
        report.write(out / "report.json")
        write_text_atomic(out / "report.md", to_markdown(report))
        write_html(report, out / "report.html", options.dataset)
        console.print(f"report: {out / 'report.html'}", markup=False)
    how = {"check": check, "allow_drop": options.allow_drop}
    if options.fix_plan:
        text = plan_repair(options.dataset, report, **how).plan()
        console.print(text, markup=False)
        if options.out:
            write_text_atomic(Path(options.out) / "fix-plan.txt", text + "\n")
    if options.fix:
        with _stop_on_sigterm():
            result = repair_dataset(options.dataset, report, options.fix, **how)
        console.print(result.text(), markup=False)
        errors = sum(counts.errors for counts in result.after.values())
        return EXIT_ERRORS if errors or not result.better else EXIT_OK
    return EXIT_OK if report.ok else EXIT_ERRORS


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """Make SIGTERM an exception, so that an unfinished copy is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_outside(options: argparse.Namespace) -> None:
    """Refuse to write into the dataset."""
    dataset = Path(options.dataset).expanduser().resolve()
    for name in ("out", "fix", "cache"):
        given = getattr(options, name)
        if given and dataset in (place := Path(given).expanduser().resolve(), *place.parents):
            raise ValueError(
                f"--{name} {given} is inside the dataset, where nothing may be written. "
                "Choose a folder outside."
            )


def _config(options: argparse.Namespace) -> CheckConfig:
    values: dict[str, object] = dict(_pair(text, "--set") for text in options.set)
    values["silence"] = options.silence
    values["severity"] = dict(_pair(text, "--severity") for text in options.severity)
    if options.annotations_only:
        values["check_images"] = False
    if options.fix or options.fix_plan:
        values["max_findings_per_code"] = EVERY_FINDING
    return CheckConfig.model_validate(values)


def _pair(text: str, option: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"{option} {text}: write NAME=VALUE")
    return name, value


def _model(options: argparse.Namespace) -> ModelConfig:
    values: dict[str, object] = {"pretrain_weights": None}
    if options.resolution is not None:
        values["resolution"] = options.resolution
    return MODEL_CONFIGS[options.model].model_validate(values)


def _print_summary(report: DatasetReport) -> None:
    for code, (first, *_) in report.by_code().items():
        count = f"{report.counts[code]:7,}"
        console.print(
            f"{first.severity:8} {code:24} {count}  {first.place()}: {first.message}", markup=False
        )
    for split, ledger in report.ledger.items():
        console.print(f"{split}: {ledger}", markup=False)
    images = sum(numbers.images for numbers in report.statistics.values())
    boxes = sum(numbers.boxes for numbers in report.statistics.values())
    console.print(
        f"{report.dataset}: {images:,} images, {boxes:,} boxes, {len(report.class_names)} classes; "
        f"{report.totals}. {report.verdict}",
        markup=False,
    )
