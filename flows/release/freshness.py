"""Whether a run has anything to do: the dataset's version, and what the registry knows already."""

from __future__ import annotations

from pathlib import Path

from flows.config.params import Params
from flows.core.digest import digest_of
from flows.core.files import read_json, read_yaml
from flows.project.project import Project
from flows.project.workspace import current_version, used_source
from flows.registry.registry import CHAMPION, Registry, Version

GATE_KEY = "gate.key"


def registry_of(project: Project, name: str | None = None) -> Registry:
    """The registered model `name` (default: params.yaml's) of the project."""
    return Registry(name or project.params.registry.name, project.tracking_uri)


def judged_version(project: Project) -> Version | None:
    """The newest version that was trained on what the dataset holds now, and judged; or None.

    A refused or rolled back version counts: the same data would bring the same verdict again. A
    winner whose promotion is not on record does not, unless it is the champion.
    """
    if not _has_registry(project):
        return None
    registry, data = registry_of(project), dataset_version(project, look=True)
    champion = registry.aliases().get(CHAMPION)
    known = [
        v
        for v in registry.versions()
        if v.tags.get("lineage.dataset_version") == data
        and (v.number == champion or ("gate.outcome" in v.tags and _settled(v)))
    ]
    return known[-1] if known else None


def dataset_version(project: Project, *, look: bool = False) -> str:
    """A cheap name of the dataset's content: pointer, version on S3, or the demo's settings.

    Nothing is downloaded and no image is read, unless the folder is under no version control. Of a
    source on S3 it is the version that the run has pinned; with `look`, what S3 holds now.
    """
    params = project.params
    pointer = project.root / f"{params.dataset.dir}.dvc"
    if pointer.exists():
        outs = read_yaml(pointer)["outs"]
        return f"dvc:{outs[0].get('md5') or outs[0].get('etag')}"
    found = used_source(project)
    if found is not None:
        source = found[1]
        pinned = None if look else source.version
        return f"s3:{digest_of([source.uri, pinned or current_version(source)])[:32]}"
    if Path(params.dataset.dir) == Path("data/demo"):
        return f"demo:{digest_of(params.demo.model_dump())[:32]}"
    return f"content:{project.dataset_digest()}"


def is_released(project: Project) -> bool:
    """Whether the registry holds the trained model and the gate has judged it by today's rules."""
    card_file = project.trained / "model.json"
    if not card_file.exists() or not _has_registry(project):
        return False
    weights = read_json(card_file)["weights_sha256"]
    key = gate_key(project.params, project.dataset_digest())
    return any(
        v.weights_sha256 == weights and v.tags.get(GATE_KEY) == key and _settled(v)
        for v in registry_of(project).versions()
    )


def gate_key(params: Params, digest: str) -> str:
    """What a verdict depends on besides the two models: rules, way of scoring, test set."""
    return digest_of([params.gate.model_dump(), params.evaluate.key(), digest])[:16]


def _settled(version: Version) -> bool:
    """A promotion that was cut off, or that waits for nobody, is not settled."""
    won = version.tags.get("gate.outcome") == "promote"
    return not won or "promotion.action" in version.tags


def _has_registry(project: Project) -> bool:
    """False for a SQLite file that is not there yet; asking MLflow would make it."""
    kind, _, path = project.tracking_uri.partition(":///")
    return kind != "sqlite" or Path(path).exists()
