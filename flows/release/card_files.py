"""Where the model cards of the versions are: in reports/ and on the run of each version."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flows.core.redact import redact
from flows.project.project import Project
from flows.registry.registry import Registry, Version
from flows.release.audit import AuditRecord
from rfdetr.files import write_text_atomic

if TYPE_CHECKING:
    from flows.release.model_card import Card

LOGGER = logging.getLogger(__name__)
STORED = "card.json"


def publish_card(
    project: Project,
    registry: Registry,
    number: int,
    card: Card,
    promotion: AuditRecord | None = None,
) -> None:
    """Write the card to the run of the version, and of the project's own model to reports/."""
    version = registry.version(number)
    files = {**card.files(promotion), STORED: card.to_json()}
    model = project.model_card
    if model.is_file() and project.read_card()["weights_sha256"] == version.weights_sha256:
        for name, text in files.items():
            write_text_atomic(project.reports / name, text)
    if registry.active_run(version) is not None:
        for name, text in files.items():
            registry.log_text(version, text, f"{_folder(version)}/{name}")


def complete_card(project: Project, registry: Registry, record: AuditRecord) -> None:
    """Write into the card of a version who made it champion and why.

    A card that is missing or unavailable is a warning: the version serves already.
    """
    from flows.release.model_card import Card  # slow imports

    version = registry.version(record.version)
    try:
        text = registry.read_text(version, f"{_folder(version)}/{STORED}")
        if text is None:
            LOGGER.warning("version %d has no model card; the gate writes one", record.version)
            return
        publish_card(project, registry, version.number, Card.from_json(text), record)
    except Exception as error:  # noqa: BLE001 - whatever the artifact store raises
        LOGGER.warning(
            "the model card of version %d was not completed: %s", record.version, redact(str(error))
        )


def _folder(version: Version) -> str:
    return f"card/version-{version.number}"
