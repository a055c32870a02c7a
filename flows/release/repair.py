"""What is wrong with the champion after the registry was moved, edited or emptied; its repair."""

from __future__ import annotations

from flows.orchestration.gpus import gpu_slot
from flows.orchestration.limits import registry_slot
from flows.project.project import Project
from flows.registry.artifacts import weights_digest
from flows.registry.logged_model import upload_model
from flows.registry.registry import MISSING_FILES, Registry, Version
from flows.release.champion import lost_champion, restore_champion
from flows.release.freshness import registry_of
from flows.release.registration import model_files
from rfdetr.tracking.local_store import follow_database


def champion_problem(project: Project) -> str | None:
    """Why there is no champion that can be loaded, although there should be one.

    The stored weights are read completely and compared with their SHA-256.
    """
    registry = registry_of(project)
    lost = lost_champion(registry)
    if lost is not None:
        return f"the alias champion was removed; the last champion was version {lost}"
    version = registry.champion()
    return None if version is None else _damage(registry, version)


def repair_champion(project: Project) -> list[str]:
    """Restore the alias and the files of the champion where possible; returns what was done.

    A copy of a project then uses its own artifacts.
    """
    follow_database(project.tracking_uri, copied=True)
    registry, done = registry_of(project), []
    with registry_slot(project):
        restored = restore_champion(registry)
        if restored is not None:
            done.append(f"version {restored} is champion again")
        version = registry.champion()
        if version is None or _damage(registry, version) is None:
            return done
        card = project.read_card() if project.model_card.exists() else {}
        weights = project.trained / str(card.get("weights"))
        if version.weights_sha256 == card.get("weights_sha256") and weights.is_file():
            with gpu_slot(project, 1):
                files, _ = model_files(project, weights, card["dataset"]["digest"])
            upload_model(registry, version.model_id, version.run_id, files)
            done.append(f"the files of version {version.number} were stored again")
    return done


def _damage(registry: Registry, version: Version) -> str | None:
    digest = weights_digest(registry.client, version.model_id)
    if digest is None:
        return f"version {version.number} {MISSING_FILES}"
    if version.weights_sha256 not in (None, "None", digest):
        return f"version {version.number} is damaged: the SHA-256 of its weights is {digest}"
    return None
