"""Moves the aliases: promotion, rollback, and the record of who did what, why and when.

The intent is written as a tag before an alias moves, so that a step that was cut off is finished
by repeating it, with the same record.
"""

from __future__ import annotations

import getpass
import os
import socket
from typing import Literal

from pydantic import BaseModel, ConfigDict

from flows.redact import redact
from flows.registry import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Registry,
    RegistryError,
    Version,
    now,
)

PENDING = "promotion.pending"
AUDIT = "audit."


class ChampionChangedError(RegistryError):
    """Another version became champion since the gate looked; gate again."""


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
        """Tag and file name of the record."""
        return f"{AUDIT}{self.at.replace(':', '')}-{self.action}"


def actor() -> str:
    """Who acts: RFDETR_ACTOR, else user@host."""
    return os.environ.get("RFDETR_ACTOR") or f"{getpass.getuser()}@{socket.gethostname()}"


def promote(
    registry: Registry,
    number: int,
    *,
    reason: str,
    by: str,
    expected_champion: int | Literal["any", "judged"] | None = "any",
    force: bool = False,
) -> AuditRecord | None:
    """Make a version champion; the old one becomes `previous_champion`. None: it already was.

    `expected_champion` is what the gate compared with (None: there was none, `judged`: the one on
    record with the version's verdict); another one now is a ChampionChangedError. A version that
    the gate refused or that was rolled back needs `force`.
    """
    version, aliases = registry.version(number), registry.aliases()
    current = aliases.get(CHAMPION)
    record = _pending(version, current)
    if record is None:
        if current == number:
            _drop_challenger(registry, number)
            return None
        if not force:
            _check_allowed(registry.name, version)
            expected = expected_champion
            if expected == "judged":
                expected = _judged_against(registry.name, version)
            _check_champion(registry.name, number, current, expected)
        record = AuditRecord(
            action="promote",
            version=number,
            previous=current,
            reason=redact(reason),
            by=redact(by),
            at=now(),
            forced=force,
        )
        registry.set_tags(number, {PENDING: record.model_dump_json()})
    if record.previous is not None:
        _set_alias(registry, PREVIOUS, record.previous)
    _set_alias(registry, CHAMPION, number)
    _drop_challenger(registry, number)
    _finish(registry, version, record)
    return record


def rollback(registry: Registry, *, reason: str, by: str, to: int | None = None) -> AuditRecord:
    """Move `champion` back to `previous_champion`, or to version `to`.

    The version left behind is tagged `promotion.rolled_back`; `previous_champion` then names the
    champion before the restored one. Raises RegistryError when there is nothing to go back to.
    """
    record = _plan_rollback(registry, redact(reason), redact(by), to)
    restored, left = registry.version(record.version), record.previous
    registry.set_tags(restored.number, {PENDING: record.model_dump_json()})
    if left is not None:
        tags = {"promotion.rolled_back": "true", "promotion.rolled_back_reason": record.reason}
        registry.set_tags(left, tags)
        _forget_intent(registry, registry.version(left))
    _set_alias(registry, CHAMPION, restored.number)
    before = _champion_before(registry, restored.number)
    if before is not None:
        _set_alias(registry, PREVIOUS, before)
    elif PREVIOUS in registry.aliases():
        registry.client.delete_registered_model_alias(registry.name, PREVIOUS)
    _drop_challenger(registry, restored.number)
    _finish(registry, restored, record)
    return record


def _plan_rollback(registry: Registry, reason: str, by: str, to: int | None) -> AuditRecord:
    """The move to make: one that was cut off, or a new one."""
    aliases = registry.aliases()
    current, target = aliases.get(CHAMPION), to or aliases.get(PREVIOUS)
    for number in (current, target):
        if number is not None:
            record = _pending(registry.version(number), current, "rollback")
            if record is not None:
                return record
    if current is None or target is None:
        missing = "champion" if current is None else "previous champion"
        raise RegistryError(
            f"{registry.name} has no {missing} to roll back; name the version that shall serve."
        )
    if target == current:
        raise RegistryError(f"{registry.name}: version {target} is champion already.")
    return AuditRecord(
        action="rollback", version=target, previous=current, reason=reason, by=by, at=now()
    )


def history(registry: Registry) -> list[AuditRecord]:
    """Every promotion and rollback, oldest first."""
    records = [
        AuditRecord.model_validate_json(value)
        for version in registry.versions()
        for key, value in version.tags.items()
        if key.startswith(AUDIT)
    ]
    return sorted(records, key=lambda record: record.at)


def _check_allowed(name: str, version: Version) -> None:
    outcome = version.tags.get("gate.outcome")
    if outcome == "refuse":
        raise RegistryError(
            f"{name} version {version.number} was refused by the gate: "
            f"{version.tags.get('gate.reason')}. Promote with force to overrule it."
        )
    if version.tags.get("promotion.rolled_back") == "true":
        raise RegistryError(
            f"{name} version {version.number} was rolled back: "
            f"{version.tags.get('promotion.rolled_back_reason')}. Promote with force to try again."
        )


def _judged_against(name: str, version: Version) -> int | Literal["any"] | None:
    """The champion that the gate compared a version with; `any` for a verdict of long ago."""
    if "gate.outcome" not in version.tags:
        raise RegistryError(
            f"{name} version {version.number} was not judged by the gate. Register it with "
            "`rfdetr-pipeline register`, or promote with --force to do without a verdict."
        )
    known = version.tags.get("gate.champion_version", "any")
    if known == "any":
        return "any"
    return None if known == "none" else int(known)


def _check_champion(
    name: str, number: int, current: int | None, expected: int | str | None
) -> None:
    if expected not in ("any", current):
        found = "there is no champion" if current is None else f"the champion is version {current}"
        compared = "no champion" if expected is None else f"version {expected}"
        raise ChampionChangedError(
            f"{name}: {found}, but the gate compared version {number} with {compared}. Run the "
            "gate again, or promote with --force."
        )


def _pending(version: Version, current: int | None, action: str = "promote") -> AuditRecord | None:
    """The unfinished move to this version, unless the champion has changed since."""
    text = version.tags.get(PENDING)
    if not text:
        return None
    record = AuditRecord.model_validate_json(text)
    begun = current == record.previous and record.key not in version.tags
    fresh = begun or current == record.version
    return record if fresh and record.action == action else None


def _champion_before(registry: Registry, number: int) -> int | None:
    """The champion that `number` once replaced, if it may serve."""
    earlier = [r for r in history(registry) if r.action == "promote" and r.version == number]
    before = earlier[-1].previous if earlier else None
    if before is None or before == number:
        return None
    tags = registry.version(before).tags
    return None if tags.get("promotion.rolled_back") == "true" else before


def _set_alias(registry: Registry, alias: str, number: int) -> None:
    registry.client.set_registered_model_alias(registry.name, alias, str(number))


def _drop_challenger(registry: Registry, number: int) -> None:
    if registry.aliases().get(CHALLENGER) == number:
        registry.client.delete_registered_model_alias(registry.name, CHALLENGER)


def _finish(registry: Registry, version: Version, record: AuditRecord) -> None:
    """Write the record on the version and on its run, then forget the intent."""
    text = record.model_dump_json()
    tags = {"promotion.rolled_back": "false"} if "promotion.rolled_back" in version.tags else {}
    names = ("action", "reason", "by", "at", "previous")
    promotion = {f"promotion.{name}": getattr(record, name) for name in names}
    registry.set_tags(version.number, {**promotion, **tags, record.key: text})
    if version.run_id:
        registry.client.log_text(version.run_id, text, f"audit/{record.key}.json")
    _forget_intent(registry, registry.version(version.number))


def _forget_intent(registry: Registry, version: Version) -> None:
    if PENDING in version.tags:
        registry.client.delete_model_version_tag(registry.name, str(version.number), PENDING)
