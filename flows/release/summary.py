"""What a run came to, in words, for the terminal."""

from __future__ import annotations

import shlex

from flows.core.files import read_object
from flows.core.redact import redact
from flows.gate.verdict import Verdict
from flows.project.project import Project
from flows.registry.registry import CHALLENGER, CHAMPION
from flows.release.freshness import registry_of
from flows.release.judgement import last_verdict
from flows.release.registration import Registered, last_registered

FINDS_NOTHING = (
    "  it finds nothing yet: check the boxes in the dataset report, start from published weights, "
    "or train\n  for more epochs (fit.epochs)"
)


def what_next(project: Project) -> str:
    """The verdict, the model and three lines that use it, and where to read on."""
    known = (project.model_card, project.test_metrics, project.registered, project.verdict)
    if not all(file.exists() for file in known):  # a skipped run in a new clone
        registry = registry_of(project)
        champion = registry.champion()
        return (
            f"champion of {registry.name}: {f'version {champion.number}' if champion else 'none'}"
        )
    card, numbers = project.read_card(), read_object(project.test_metrics, "map_50")
    registered, verdict = last_registered(project), last_verdict(project)
    weights = (project.trained / card["weights"]).absolute()
    threshold = numbers.get("best_threshold") or 0.5  # 0: nothing was found
    return "\n".join(
        [
            "",
            *_outcome(project, registered, verdict),
            *([] if numbers["map_50"] else [FINDS_NOTHING]),
            "",
            f"model file       {weights}",
            "",
            "    from rfdetr import RFDETR",
            f"    detector = RFDETR.from_checkpoint({str(weights)!r})",
            f'    detections = detector.predict("photo.jpg", threshold={threshold:.2f})',
            "",
            f"dataset report   {project.validation.with_suffix('.html')}",
            f"training         {project.fit_picture}",
            f"predictions      {project.reports / 'pictures/samples.png'}",
            *_commands(registered, served=registry_of(project).champion() is not None),
            "who and why      rfdetr-pipeline history",
        ]
    )


def _outcome(project: Project, registered: Registered, verdict: Verdict) -> list[str]:
    """Who is champion and, if it is not the new version, what to do about it."""
    champion = registry_of(project).champion()
    name, number = registered.name, registered.number
    if champion is not None and champion.number == number:
        return [f"version {number} of {name} is champion: {verdict.reason}"]
    serves = "there is no champion" if champion is None else f"champion: version {champion.number}"
    lines = [f"version {number} of {name} is not champion ({serves}): {verdict.reason}"]
    model = CHALLENGER if registry_of(project).aliases().get(CHALLENGER) == number else number
    lines.append(f"  try it           rfdetr-pipeline predict IMAGES --model {model}")
    force = " --force" if verdict.outcome == "refuse" else ""
    why = '--reason "..."'
    lines.append(f"  promote it       rfdetr-pipeline promote {number} {why}{force}")
    if any(rule.name == "min_images" and rule.passed is False for rule in verdict.rules):
        lines.append("  or               add images to the test split, then retrain")
    return lines


def _commands(registered: Registered, *, served: bool) -> list[str]:
    """How to serve a champion if there is one, and the runs in MLflow's view for training.

    The address of the store is spelled out, since MLflow's default fails in a folder with a space.
    """
    page = f"/#/experiments/{registered.experiment}?workflowType=machine_learning"
    uri = shlex.quote(redact(registered.uri))
    model = shlex.quote(f"models:/{registered.name}@{CHAMPION}")
    serve = f"MLFLOW_TRACKING_URI={uri} mlflow models serve -m {model} --env-manager local -p 8080"
    if registered.uri.startswith(("http://", "https://")):
        experiments = [f"experiments      {redact(registered.uri).rstrip('/')}{page}"]
    else:
        experiments = [
            f"experiments      mlflow ui --backend-store-uri {uri}",
            f"                 then http://127.0.0.1:5000{page}",
        ]
    use = [
        "predict          rfdetr-pipeline predict IMAGES --out found",
        f"serve            {serve}",
    ]
    return [*(use if served else []), *experiments]
