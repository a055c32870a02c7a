"""Whether there is anything to do: dataset versions, and what the registry already contains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows.core.digest import digest_of
from flows.core.files import read_yaml
from flows.project import workspace
from flows.project.project import Project
from flows.registry.artifacts import has_files
from flows.registry.registry import CHAMPION, Registry, Version
from flows.release.champion import lost_champion
from rfdetr.errors import ConfigError

GATE_KEY = "gate.key"
UNREGISTERED = "the model is not registered, or was not judged with these parameters"


@dataclass(frozen=True)
class DatasetVersion:
    """Identifies the content of the dataset, mostly without reading it.

    | kind    | source of the dataset              | identified by                          |
    |---------|------------------------------------|----------------------------------------|
    | dvc     | a DVC pointer file                 | the hash in the pointer                |
    | s3      | `sources` in params.yaml           | the address and version of the objects |
    | demo    | the generator                      | its settings                           |
    | content | a folder without version control   | a hash of its files                    |
    """

    kind: Literal["dvc", "s3", "demo", "content"]
    value: str

    def __str__(self) -> str:
        """The value of the tag `lineage.dataset_version`."""
        return f"{self.kind}:{self.value}"


def registry_of(project: Project, name: str | None = None) -> Registry:
    """The registered model `name` (default: params.yaml's) of the project."""
    return Registry(name or project.params.registry.name, project.tracking_uri)


def judged_version(project: Project) -> Version | None:
    """The newest version that was trained and judged on the current dataset, or None.

    Refused and rolled back versions count, because the same data would lead to the same verdict. A
    winner that was not promoted counts only if it is the champion.
    """
    if not _has_registry(project):
        return None
    registry, dataset = registry_of(project), str(current_version(project))
    champion = registry.aliases().get(CHAMPION)
    found = registry.tagged({"lineage.dataset_version": dataset})
    known = (v for v in found if v.number == champion or ("gate.outcome" in v.tags and _settled(v)))
    return next(known, None)


def pinned_version(project: Project) -> DatasetVersion:
    """The dataset version that the project's files pin: the one that a training uses."""
    return _version(project, pinned=True)


def current_version(project: Project) -> DatasetVersion:
    """The dataset version that a new flow run would use: for S3, what is stored there now."""
    return _version(project, pinned=False)


def _version(project: Project, *, pinned: bool) -> DatasetVersion:
    params = project.params
    pointer = project.root / f"{params.dataset.dir}.dvc"
    if pointer.exists():
        return DatasetVersion("dvc", _hash_in(pointer))
    used = workspace.used_source(project)
    if used is not None:
        _, source = used
        version = (source.version if pinned else None) or workspace.current_version(source)
        return DatasetVersion("s3", digest_of([source.uri, version])[:32])
    if Path(params.dataset.dir) == Path("data/demo"):
        return DatasetVersion("demo", digest_of(params.demo.model_dump())[:32])
    return DatasetVersion("content", project.dataset_digest())


def _hash_in(pointer: Path) -> str:
    """The hash of a DVC pointer file. Raises ConfigError if it has none."""
    try:
        out = read_yaml(pointer)["outs"][0]
        return str(out.get("md5") or out["etag"])
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ConfigError(
            f"{pointer} names no hash. Restore it from git, or run `dvc add {pointer.stem}`."
        ) from None


def unreleased(project: Project) -> str | None:
    """What a release would do for the trained model, or None if there is nothing to do.

    Nothing, if it is registered, was judged with the current parameters, and can be loaded, and if
    the champion can be loaded too.
    """
    card_file = project.model_card
    if not card_file.exists() or not _has_registry(project):
        return UNREGISTERED
    registry, weights = registry_of(project), project.read_card()["weights_sha256"]
    tags = {"weights.sha256": weights, GATE_KEY: gate_key(project, project.dataset_digest())}
    known = next((v for v in registry.tagged(tags) if _settled(v)), None)
    if known is None:
        return UNREGISTERED
    lost = lost_champion(registry)
    if lost is not None:
        return f"the alias champion is missing; the last champion was version {lost}"
    for version in (known, registry.champion()):
        if version is not None and not has_files(registry.client, version.model_id):
            return f"the files of version {version.number} are missing"
    return None


def gate_key(project: Project, digest: str) -> str:
    """Key of what a verdict depends on besides the models: gate, evaluation, dataset."""
    params = project.params
    how = [params.gate.model_dump(), params.evaluate.key(project.slices), digest]
    return digest_of(how)[:16]


def _settled(version: Version) -> bool:
    """False if the gate decided to promote, but the promotion was not carried out."""
    won = version.tags.get("gate.outcome") == "promote"
    return not won or "promotion.action" in version.tags


def _has_registry(project: Project) -> bool:
    """False if the SQLite file does not exist; connecting would create it."""
    kind, _, path = project.tracking_uri.partition(":///")
    return kind != "sqlite" or Path(path).exists()
