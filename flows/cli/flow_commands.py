"""The subcommands that run a Prefect flow in this process: `retrain` and `drift`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator

from flows.cli.commands import checked, checked_project, parse_changes, place, project_here
from flows.core.errors import FAILED, OK
from flows.core.files import read_record
from flows.project.project import Project
from rfdetr.errors import ConfigError

DRIFTED = 3


def retrain_command(options: argparse.Namespace) -> int:
    """Run the flow in this process, unless there is nothing to do."""
    from flows.config.overrides import RetrainParams
    from flows.project.dvc import configure_dvc
    from flows.project.plan import plan_stages
    from flows.project.workspace import pin_source
    from flows.release import freshness
    from flows.release.summary import what_next

    project = checked_project()
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
    if all(p.state == "up to date" for p in plans) and freshness.unreleased(project) is None:
        print("nothing to do: data, parameters and code are those of the registered model")
        print(what_next(project))
        return OK
    for plan in plans:
        print(f"{plan.stage:10} {plan.state}")
    with _prefect(project):
        from flows.retrain import retrain

        retrain(params)
    print(what_next(project))
    return OK


def drift_command(options: argparse.Namespace) -> int:
    """Run the flow drift-check in this process: report, event, notification."""
    from flows.inference.drift import REPORT, DriftCheck, DriftParams, recent_images
    from flows.inference.predict import find_version
    from flows.registry.registry import Registry

    sources = [place(source) for source in options.sources]
    project = project_here()
    params = checked(
        DriftParams, hours=options.hours, limit=options.limit, min_images=options.min_images
    )
    find_version(Registry(project.params.registry.name, project.tracking_uri), params.model)
    recent_images(sources, params)  # what cannot work is said before a server is started
    with _prefect(project):
        from flows.drift_check import drift_check

        drift_check(sources, params)
    check = read_record(project.root / REPORT, DriftCheck)
    print(check.to_markdown())
    if options.exit_code and check.report is None:
        print("nothing was judged", file=sys.stderr)
        return FAILED
    return DRIFTED if options.exit_code and check.drifted else OK


@contextlib.contextmanager
def _prefect(project: Project) -> Iterator[None]:
    """A Prefect server for one flow run; explains if the server of PREFECT_API_URL is down."""
    from flows.orchestration.prefect_log import readable_prefect_log
    from flows.orchestration.temporary_server import prefect_server

    with prefect_server(project.env.state_dir / "prefect.log"):
        readable_prefect_log()
        try:
            yield
        except RuntimeError as error:
            if "Failed to reach API" not in str(error):
                raise
            raise ConfigError(
                f"Prefect: {error}. Start that server, or unset PREFECT_API_URL to use a "
                "temporary one; `dvc repro` runs the stages without Prefect."
            ) from None
