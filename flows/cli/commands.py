"""The subcommands of `rfdetr-pipeline`: each takes the parsed options and returns a status."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from flows.config.environment import FIT_RETRY
from flows.config.overrides import takes_null
from flows.config.params import SECTIONS, unknown_name
from flows.core.errors import FAILED, OK
from flows.core.files import parse_yaml
from flows.project.project import Project
from rfdetr.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
DRIFTED = 3


def parse_changes(texts: Sequence[str]) -> dict[str, dict[str, object]]:
    """Parse `section.field=value` texts, whose values are YAML, into nested data."""
    changes: dict[str, dict[str, object]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        section, dot, field = name.partition(".")
        if not (equals and dot and section and field):
            raise ConfigError(f"--set {text}: write it as section.field=value, e.g. fit.epochs=20.")
        changes.setdefault(section, {})[field] = parse_yaml(
            value, origin=f"--set {text}: '{value}'"
        )
        known = section in SECTIONS and field in SECTIONS[section].model_fields
        if changes[section][field] is None and known and not takes_null(section, field):
            raise ConfigError(f"--set {text}: {name} cannot be empty or null; give it a value.")
    return changes


def retrain_command(options: argparse.Namespace) -> int:
    """Run the flow in this process, unless there is nothing to do."""
    from flows.config.overrides import RetrainParams
    from flows.project.dvc import configure_dvc
    from flows.project.plan import plan_stages
    from flows.project.workspace import pin_source
    from flows.release import freshness, steps

    project = _checked_project()
    changes = parse_changes(options.set)
    params = checked(
        RetrainParams,
        overrides=changes,
        promote=not options.no_promote,
        publish=options.publish,
        only_if_data_changed=options.only_if_data_changed,
    )
    project.override(params.changes())
    configure_dvc(project.root, project.env)
    pin_source(project)
    plans = plan_stages(project)
    if all(p.state == "up to date" for p in plans) and freshness.is_released(project):
        print("nothing to do: data, parameters and code are those of the registered model")
        print(steps.what_next(project))
        return OK
    for plan in plans:
        print(f"{plan.stage:10} {plan.state}")
    with _prefect():
        from flows.retrain import retrain

        retrain(params)
    print(steps.what_next(project))
    return OK


def plan_command(options: argparse.Namespace) -> int:
    """Print which stages would run, without running any."""
    from flows.project.dvc import configure_dvc
    from flows.project.plan import plan_stages
    from flows.release import freshness

    project = _checked_project()
    if not (project.root / ".dvc/config.local").exists():  # a folder without git needs it
        configure_dvc(project.root, project.env)
    plans = plan_stages(project)
    released = all(p.state == "up to date" for p in plans) and freshness.is_released(project)
    if options.json:
        data = {"stages": [p.model_dump() for p in plans], "released": released}
        print(json.dumps(data, indent=2))
        return OK
    for plan in plans:
        print(f"{plan.stage:10} {plan.state}")
        for reason in plan.reasons:
            print(f"             {reason}")
    print(f"{'release':10} {'up to date' if released else 'runs'}")
    return OK


def stage_command(stage: str) -> Callable[[argparse.Namespace], int]:
    """`dvc repro STAGE`: the stage, and the earlier ones that are out of date."""

    def run(options: argparse.Namespace) -> int:
        from flows.project.dvc import configure_dvc, dvc
        from flows.project.workspace import require_dataset

        project = _checked_project()
        configure_dvc(project.root, project.env)
        require_dataset(project, print)
        variables = {FIT_RETRY: "1"} if getattr(options, "retry", False) else {}
        dvc(project.root, "repro", stage, on_line=print, variables=variables)
        return OK

    return run


def register_command(_options: argparse.Namespace) -> int:
    """Register models/trained and run the gate, without Prefect."""
    from flows.orchestration.limits import registry_slot
    from flows.release import steps

    project = _project()
    with registry_slot(project):
        registered = steps.register(project)
    verdict = steps.judge(project, registered.number)
    print(verdict.to_markdown())
    if verdict.promote:
        steps.promote_winner(project, registered.number, verdict)
    print(steps.what_next(project))
    return OK


def promote_command(options: argparse.Namespace) -> int:
    """Make a version champion by hand; this also gives the approval of `gate.manual_approval`."""
    from flows.release import steps

    record = steps.promote_by_hand(
        _project(), options.version, reason=options.reason, force=options.force
    )
    print("already champion" if record is None else f"version {record.version} is champion")
    return OK


def rollback_command(options: argparse.Namespace) -> int:
    """Make an earlier version champion again."""
    from flows.release import steps

    record = steps.roll_back(_project(), reason=options.reason, to=options.to)
    left = "" if record.previous is None else f"; version {record.previous} was left"
    print(f"version {record.version} serves again{left}")
    return OK


def history_command(options: argparse.Namespace) -> int:
    """Print every promotion and rollback, oldest first."""
    from flows.release import steps

    records = steps.audit(_project())
    if options.json:
        print(json.dumps([r.model_dump() for r in records], indent=2))
        return OK
    for record in records:
        before = "-" if record.previous is None else record.previous
        print(
            f"{record.at[:19]}  {record.action:8}  {before} -> {record.version}  "
            f"by {record.by}: {record.reason}"
        )
    if not records:
        print("no champion yet")
    return OK


def predict_command(options: argparse.Namespace) -> int:
    """Run a registered model on images: COCO files, and the detections drawn on each image."""
    from flows.inference.predict import predict_images

    sources, out = [_place(source) for source in options.images], _place(options.out)
    found = predict_images(
        _project(),
        sources,
        out,
        model=options.model,
        threshold=options.threshold,
        draw=not options.no_draw,
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(found)))
        return OK
    print(
        f"{found.images} images, {found.detections} detections by {found.model} version "
        f"{found.version}: {found.out}/detections.json"
    )
    if found.unreadable:
        print(f"{found.unreadable} files are not images; detections.json names them")
    return OK


def drift_command(options: argparse.Namespace) -> int:
    """Run the flow drift-check in this process: report, event, notification."""
    from flows.inference.drift import REPORT, DriftCheck, DriftParams

    source = _place(options.source)
    project = _project()
    params = checked(DriftParams, hours=options.hours, limit=options.limit)
    with _prefect():
        from flows.drift_check import drift_check

        drift_check(source, params)
    check = DriftCheck.model_validate_json((project.root / REPORT).read_text(encoding="utf-8"))
    print(check.to_markdown())
    return DRIFTED if options.exit_code and check.drifted else OK


@contextlib.contextmanager
def _prefect() -> Iterator[None]:
    """Give a temporary Prefect server time to start, and explain if a server cannot be reached."""
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    try:
        yield
    except RuntimeError as error:
        if "Failed to reach API" not in str(error):
            raise
        raise ConfigError(
            f"Prefect: {error}. Start that server, or unset PREFECT_API_URL to use a temporary "
            "one; `dvc repro` runs the stages without Prefect."
        ) from None


def _place(text: str) -> str:
    """Make a path absolute, before the current folder changes; an s3:// address stays as it is."""
    from flows.storage.s3 import is_s3

    return text if is_s3(text) else str(Path(text).absolute())


def labels_command(options: argparse.Namespace) -> int:
    """List the labels of a split that are probably wrong."""
    from flows.cli.labels import review_labels

    return review_labels(_checked_project(), options)


def demo_command(options: argparse.Namespace) -> int:
    """Build the demo dataset: digits on photographs, in Roboflow's COCO layout."""
    from rfdetr.data.demo import build_demo

    print(build_demo(options.folder, progress=sys.stderr.isatty()))
    return OK


def pack_command(options: argparse.Namespace) -> int:
    """Write FOLDER as tar shards, or the files of PACK back into a new FOLDER."""
    from flows.storage.packs import pack, unpack

    bar = sys.stderr.isatty()
    if options.unpack:
        print(unpack(options.pack, options.folder, progress=bar))
    else:
        print(pack(options.folder, options.pack, progress=bar))
    return OK


def sync_command(_options: argparse.Namespace) -> int:
    """Send every unsent journal to MLflow."""
    from flows.tracking.run import sync

    project = _project()
    results = sync(project.env.state_dir, project.tracking_uri)
    for folder, problem in results.items():
        print(f"{folder}: {problem or 'sent'}")
    return FAILED if any(results.values()) else OK


def doctor_command(options: argparse.Namespace) -> int:
    """Print the findings; status 1 if one is a problem."""
    from flows.cli import doctor

    findings = doctor.examine(_project(), repair=options.repair)
    for finding in findings:
        advice = f"  -> {finding.repair}" if finding.repair else ""
        print(f"{finding.level:8} {finding.subject}: {finding.text}{advice}")
    return FAILED if any(finding.level == "problem" for finding in findings) else OK


def checked(kind: type[M], **fields: object) -> M:
    """Build a pydantic model. Raises ConfigError with one line per mistake."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        lines = [f"- {_mistake(item)}" for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(["wrong parameters:", *lines])) from None


def _mistake(item: Any) -> str:
    first, *where = map(str, item["loc"])
    if first == "overrides" and where and item["type"] == "extra_forbidden":
        known: Any = SECTIONS if len(where) == 1 else SECTIONS[where[0]].model_fields
        return unknown_name(where[-1], "".join(f"{part}." for part in where[:-1]), known)
    return f"{'.'.join(where or [first])}: {item['msg']} (found {item['input']!r})."


def _checked_project() -> Project:
    """The project. Raises ConfigError with every mistake in params.yaml, before DVC starts."""
    project = _project()
    _ = project.params
    return project


def _project() -> Project:
    """The project of the current folder: dvc.yaml is here or above."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").exists():
            os.chdir(folder)
            return Project(folder)
    raise ConfigError(f"{here} is not inside a project: no dvc.yaml here or above.")
