"""Where the model cards of the versions are: in reports/ and on the run of each version."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from flows.core.redact import redact
from flows.project.project import Project
from flows.registry.registry import Registry, Version
from flows.release.audit import AuditRecord, history
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
    *,
    replaced: AuditRecord | None = None,
) -> None:
    """Write the card to the run of the version, and of the project's own model to reports/."""
    version = registry.version(number)
    files = {**card.files(promotion, replaced), STORED: card.to_json()}
    model = project.model_card
    if model.is_file() and project.read_card()["weights_sha256"] == version.weights_sha256:
        for name, text in files.items():
            write_text_atomic(project.reports / name, text)
    if registry.active_run(version) is not None:
        for name, text in files.items():
            registry.log_text(version, text, f"{_folder(version)}/{name}")


def complete_cards(project: Project, registry: Registry, record: AuditRecord) -> None:
    """Write into the cards of the new and the old champion who changed it, when and why.

    A card that is missing or unavailable is a warning: the version serves already.
    """
    number = record.version
    try:
        _complete(project, registry, record)
        own = [move for move in history(registry) if move.version == record.previous]
        if own and registry.exists(number := own[-1].version):
            _complete(project, registry, own[-1], replaced=record)
    except Exception as error:  # noqa: BLE001 - whatever the artifact store raises
        LOGGER.warning(
            "the model card of version %d was not completed: %s", number, redact(str(error))
        )


def _complete(
    project: Project,
    registry: Registry,
    promotion: AuditRecord,
    *,
    replaced: AuditRecord | None = None,
) -> None:
    from flows.release.model_card import Card  # slow imports

    version = registry.version(promotion.version)
    text = registry.read_text(version, f"{_folder(version)}/{STORED}")
    if text is None:
        LOGGER.warning("version %d has no model card; the gate writes one", version.number)
        return
    card = Card.from_json(text)
    publish_card(project, registry, version.number, card, promotion, replaced=replaced)


def _folder(version: Version) -> str:
    return f"card/version-{version.number}"
