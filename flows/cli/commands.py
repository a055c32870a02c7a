"""The subcommands of `rfdetr-pipeline`: each takes the parsed options and returns a status."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from flows.config.environment import FIT_RETRY
from flows.config.overrides import takes_null
from flows.config.params import SECTIONS, unknown_name
from flows.core.errors import FAILED, OK
from flows.core.files import parse_yaml, require_merged
from flows.project.project import Project
from rfdetr.errors import ConfigError

M = TypeVar("M", bound=BaseModel)


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


def plan_command(options: argparse.Namespace) -> int:
    """Print which stages would run, without running any."""
    from flows.project.dvc import configure_dvc, knows_git
    from flows.project.plan import plan_stages
    from flows.release import freshness

    project = checked_project()
    if not knows_git(project.root):  # otherwise nothing is written
        configure_dvc(project.root, project.env)
    plans = plan_stages(project)
    done = all(p.state == "up to date" for p in plans)
    reason = freshness.unreleased(project) if done else "after the stages"
    if options.json:
        data = {"stages": [p.model_dump() for p in plans], "released": reason is None}
        print(json.dumps(data, indent=2))
        return OK
    for plan in plans:
        print(f"{plan.stage:10} {plan.state}")
        for reason in plan.reasons:
            print(f"             {reason}")
    print(f"{'release':10} {'runs' if reason else 'up to date'}")
    if done and reason not in (None, freshness.UNREGISTERED):
        print(f"             {reason}")
    return OK


def stage_command(stage: str) -> Callable[[argparse.Namespace], int]:
    """`dvc repro STAGE`: the stage, and the earlier ones that are out of date."""

    def run(options: argparse.Namespace) -> int:
        from flows.orchestration.gpus import gpu_of_command
        from flows.project.dvc import EXTRA_GRACE_S, configure_dvc, dvc
        from flows.project.workspace import require_dataset

        project = checked_project()
        configure_dvc(project.root, project.env)
        require_dataset(project, print)
        variables = {FIT_RETRY: "1"} if getattr(options, "retry", False) else {}
        grace = project.params.runtime.grace_s + EXTRA_GRACE_S
        uses_gpu = stage in ("fit", "evaluate")
        with gpu_of_command(project, None) if uses_gpu else contextlib.nullcontext():
            dvc(project.root, "repro", stage, on_line=print, variables=variables, grace=grace)
        return OK

    return run


def register_command(_options: argparse.Namespace) -> int:
    """Register models/trained and run the gate, without Prefect."""
    from flows.orchestration.gpus import gpu_of_command
    from flows.orchestration.limits import registry_slot
    from flows.release.judgement import judge
    from flows.release.registration import register
    from flows.release.steps import promote_winner
    from flows.release.summary import what_next

    project = project_here()
    with gpu_of_command(project):
        with registry_slot(project):
            registered = register(project)
        verdict = judge(project, registered.number)
    print(verdict.to_markdown())
    if verdict.promote:
        promote_winner(project, registered.number, verdict)
    print(what_next(project))
    return OK


def promote_command(options: argparse.Namespace) -> int:
    """Make a version champion by hand; this also gives the approval of `gate.manual_approval`."""
    from flows.release import steps

    record = steps.promote_by_hand(
        project_here(), options.version, reason=options.reason, force=options.force
    )
    print("already champion" if record is None else f"version {record.version} is champion")
    return OK


def rollback_command(options: argparse.Namespace) -> int:
    """Make an earlier version champion again."""
    from flows.release import steps

    record = steps.roll_back(project_here(), reason=options.reason, to=options.to)
    left = "" if record.previous is None else f"; version {record.previous} was left"
    print(f"version {record.version} serves again{left}")
    return OK


def history_command(options: argparse.Namespace) -> int:
    """Print every promotion and rollback, oldest first."""
    from flows.release import steps

    records = steps.audit(project_here())
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
    from flows.orchestration.gpus import gpu_of_command

    sources, out = [place(source) for source in options.images], place(options.out)
    project = project_here()
    with gpu_of_command(project):
        found = predict_images(
            project,
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
        f"{found.version}"
    )
    if found.best is not None:
        score, image = found.best
        limit = "" if options.threshold is None else f" {options.threshold:g}"
        print(
            f"nothing reached the threshold{limit}; the best score of the first "
            f"images is {score:.3f} ({image}): try --threshold {score * 0.9:.2g}"
        )
    if found.unreadable:
        print(f"{found.unreadable} files are not images; detections.json names them")
    print(f"  {found.out}/detections.json  COCO dataset: images, boxes with scores, categories")
    print(f"  {found.out}/results.json     COCO results, for pycocotools")
    if found.drawn:
        print(f"  {found.out}/pictures/        the images with their detections")
    return OK


def export_command(options: argparse.Namespace) -> int:
    """Write a model as an ONNX file, with class names, input size and normalisation inside."""
    from flows.inference.export import export_model

    target, model = Path(place(options.out)), options.model
    if model is not None and Path(model).exists():
        model = place(model)
    exported = export_model(project_here(), model, target)
    print(f"{target}: differs from the network by at most {exported.difference:.1g}")
    return OK


def place(text: str) -> str:
    """Make a path absolute, before the current folder changes; an s3:// address stays as it is."""
    from flows.storage.s3 import is_s3

    return text if is_s3(text) else str(Path(text).absolute())


def labels_command(options: argparse.Namespace) -> int:
    """List the labels of a split that are probably wrong."""
    from flows.cli.labels import review_labels

    return review_labels(checked_project(), options)


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

    project = project_here()
    results = sync(project.env.state_dir, project.tracking_uri)
    for folder, problem in results.items():
        print(f"{folder}: {problem or 'sent'}")
    return FAILED if any(results.values()) else OK


def doctor_command(options: argparse.Namespace) -> int:
    """Print the findings; status 1 if one is a problem."""
    from flows.cli import doctor

    findings = doctor.examine(project_here(), repair=options.repair)
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


def checked_project() -> Project:
    """The project. Raises ConfigError with every mistake in params.yaml, before DVC starts."""
    project = project_here()
    _ = project.params
    return project


def project_here() -> Project:
    """The project of the current folder: dvc.yaml is here or above."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "dvc.yaml").exists():
            os.chdir(folder)
            project = Project(folder)
            if project.lock_file.is_file():
                text = project.lock_file.read_text(encoding="utf-8", errors="replace")
                require_merged(text, str(project.lock_file))
            return project
    raise ConfigError(f"{here} is not inside a project: no dvc.yaml here or above.")
