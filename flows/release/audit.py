"""Who moved the alias `champion`, when and why: one record a move, kept as a tag."""

from __future__ import annotations

import getpass
import logging
import os
import socket
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from flows.registry.registry import Registry

LOGGER = logging.getLogger(__name__)
PENDING = "promotion.pending"  # the tag of a version whose move was not finished
AUDIT = "audit."


class AuditRecord(BaseModel):
    """One move of the champion alias, from version `previous` to `version`."""

    model_config = ConfigDict(frozen=True)

    action: Literal["promote", "rollback"]
    version: int
    previous: int | None
    reason: str
    by: str
    at: str
    forced: bool = False

    @property
    def key(self) -> str:
        """Name of the tag and of the file that hold the record."""
        return f"{AUDIT}{self.at.replace(':', '')}-{self.action}"


def actor(named: str | None = None) -> str:
    """Who acts: `named`, else user@host, with `uid <number>` for a user without a name."""
    if named:
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # container users may be missing from /etc/passwd
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


def history(registry: Registry) -> list[AuditRecord]:
    """Every promotion and rollback, oldest first.

    The registered model has all records, except perhaps that of an interrupted move, which is on a
    version with an intent. Only a model without any may have them on its versions alone.
    """
    tags = registry.model_tags()
    wanted = {PENDING: None} if any(key.startswith(AUDIT) for key in tags) else {}
    sources = [tags, *(version.tags for version in registry.tagged(wanted))]
    records = {
        record
        for found in sources
        for key, value in found.items()
        if key.startswith(AUDIT) and (record := record_of(registry.name, key, value)) is not None
    }
    return sorted(records, key=lambda record: record.at)


def record_of(name: str, key: str, text: str) -> AuditRecord | None:
    """The record in a tag; None, with a warning, for a tag that was edited by hand."""
    try:
        return AuditRecord.model_validate_json(text)
    except ValidationError:
        LOGGER.warning("the tag %s of %s was edited and holds no record any more", key, name)
        return None
