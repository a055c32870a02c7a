"""The command line `rfdetr-pipeline`: the pipeline, its stages, the registry, predictions."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from flows.cli import commands as run
from flows.cli import flow_commands as flow
from flows.cli import import_data, init, labels
from flows.config.environment import bypass_proxies
from flows.core.child_report import report_failure
from flows.core.errors import FAILED, INTERRUPTED
from flows.core.garbage import collect_rarely, without_tables
from flows.core.quiet import readable_warnings
from flows.core.stopping import Terminated, say_last_words, stop_on_signals, stopped_status
from flows.project.workspace import STAGES

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
LIGHT = (
    run.plan_command,
    run.history_command,
    run.promote_command,
    run.rollback_command,
    run.doctor_command,
)

EXAMPLES = """examples:
  rfdetr-pipeline init ~/trees                  your own dataset instead of the demo
  rfdetr-pipeline retrain                       the complete pipeline
  rfdetr-pipeline retrain --set fit.epochs=20   with a changed parameter
  rfdetr-pipeline plan                          what would run, and why
  rfdetr-pipeline validate                      one stage
  rfdetr-pipeline predict photo.jpg --out found the champion on images
  rfdetr-pipeline drift incoming/               do recent images resemble the training set
  rfdetr-pipeline rollback --reason "misses small parts"
  rfdetr-pipeline history
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status. Errors are one message on standard error."""
    options = parser().parse_args(arguments)
    if arguments is None:  # a process of its own
        stop_on_signals()
        collect_rarely()
        readable_warnings()
        if options.run in LIGHT and not getattr(options, "repair", False):
            without_tables()
        if isinstance(sys.stdout, io.TextIOWrapper):  # file names that its encoding lacks
            sys.stdout.reconfigure(errors="backslashreplace")
    bypass_proxies()
    command: Callable[[argparse.Namespace], int] = options.run
    try:
        return command(options)
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:  # noqa: BLE001 - a message instead of a traceback
        stopped = stopped_status()
        if stopped is not None:  # errors of a child or server that ends too are expected
            say_last_words()
            return stopped
        report_failure("error", error)
        return FAILED
    except KeyboardInterrupt:
        say_last_words()
        return INTERRUPTED
    except Terminated:
        say_last_words()
        raise


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    root = argparse.ArgumentParser(
        prog="rfdetr-pipeline",
        description="Retrain, gate and register RF-DETR detectors.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = root.add_subparsers(required=True, metavar="command")
    _pipeline_commands(commands)
    _registry_commands(commands)
    _model_commands(commands)
    _data_commands(commands)
    return root


def _pipeline_commands(commands: Commands) -> None:
    starting = _add(commands, "init", init.init_command, "set the project up for your own dataset")
    init.add_options(starting)
    retrain = _add(commands, "retrain", flow.retrain_command, "run the pipeline as a Prefect flow")
    _changes(retrain)
    retrain.add_argument(
        "--no-promote", action="store_true", help="register, but keep the champion"
    )
    retrain.add_argument("--publish", action="store_true", help="push dvc.lock to a branch")
    retrain.add_argument(
        "--only-if-data-changed",
        action="store_true",
        help="do nothing if this data was judged before",
    )
    plan = _add(commands, "plan", run.plan_command, "what would run, and why")
    plan.add_argument("--json", action="store_true", help="print JSON")
    stages = {
        stage: _add(
            commands, stage, run.stage_command(stage), f"run the stage {stage} and what it needs"
        )
        for stage in STAGES
    }
    stages["fit"].add_argument("--retry", action="store_true", help="forget failed attempts first")


def _registry_commands(commands: Commands) -> None:
    _add(commands, "register", run.register_command, "register the trained model and run the gate")
    back = _add(
        commands, "rollback", run.rollback_command, "make an earlier version champion again"
    )
    back.add_argument("--reason", required=True, help="goes into the audit record")
    back.add_argument("--to", type=int, help="a version number (default: the previous champion)")
    approve = _add(commands, "promote", run.promote_command, "make a version champion by hand")
    approve.add_argument("version", type=int)
    approve.add_argument("--reason", required=True, help="goes into the audit record")
    approve.add_argument("--force", action="store_true", help="overrule the gate or a rollback")
    history = _add(
        commands, "history", run.history_command, "who promoted which version, when and why"
    )
    history.add_argument("--json", action="store_true", help="print JSON")


def _model_commands(commands: Commands) -> None:
    predict = _add(commands, "predict", run.predict_command, "run the champion on images")
    _predict_options(predict)
    export = _add(commands, "export", run.export_command, "write a model as an ONNX file")
    export.add_argument("--model", help="alias, version number or file (default: champion)")
    export.add_argument("--out", default="model.onnx", help="the file (default: model.onnx)")
    drift = _add(commands, "drift", flow.drift_command, "compare recent images with the champion's")
    drift.add_argument("sources", nargs="+", help="files, folders or s3:// prefixes")
    drift.add_argument("--hours", type=float, help="only images newer than this")
    drift.add_argument("--limit", type=int, default=512, help="the newest images (default: 512)")
    drift.add_argument(
        "--min-images", type=int, default=30, help="judge nothing with fewer images (default: 30)"
    )
    drift.add_argument(
        "--exit-code", action="store_true", help="status 3 with drift, 1 if too few images"
    )
    review = _add(commands, "labels", run.labels_command, "find labels that are probably wrong")
    labels.add_options(review)


def _data_commands(commands: Commands) -> None:
    demo = _add(commands, "demo", run.demo_command, "build the demo dataset in a folder")
    demo.add_argument("folder", type=Path, nargs="?", default=Path("data/demo"))
    importing = _add(
        commands, "import", import_data.import_command, "convert a dataset from another format"
    )
    import_data.add_options(importing)
    pack = _add(commands, "pack", run.pack_command, "many small files as a few tar shards for DVC")
    pack.add_argument("folder", type=Path, metavar="FOLDER", help="the small files")
    pack.add_argument("pack", type=Path, metavar="PACK", help="the folder of the shards")
    pack.add_argument("--unpack", action="store_true", help="write PACK's files to a new FOLDER")
    _add(commands, "sync", run.sync_command, "send unsent tracking records to MLflow")
    doctor = _add(
        commands, "doctor", run.doctor_command, "find unsent records, leaked slots and leftovers"
    )
    doctor.add_argument("--repair", action="store_true", help="apply safe repairs")


def _add(
    commands: Commands,
    name: str,
    command: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=command)
    return parser


def _predict_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", help="files, folders or s3:// prefixes")
    parser.add_argument("--out", default="predictions", help="folder (default) or s3:// prefix")
    parser.add_argument(
        "--threshold",
        type=float,
        help="score threshold (default: the model's operating point, 0.5 if it has none)",
    )
    parser.add_argument("--model", help="alias or version number (default: champion)")
    parser.add_argument("--no-draw", action="store_true", help="do not draw the detections")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change params.yaml for this and later runs; may be repeated",
    )


if __name__ == "__main__":
    sys.exit(main())
