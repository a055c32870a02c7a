"""Moves the aliases: promotion, rollback, and the record of who did what, why and when.

The intent is written as a tag before an alias moves, so that a step that was cut off is finished
by repeating it, with the same record.
"""

from __future__ import annotations

import getpass
import logging
import os
import socket
from typing import Literal

from pydantic import BaseModel, ConfigDict

from flows.core.redact import redact
from flows.registry.registry import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Registry,
    RegistryError,
    Version,
    now,
)

LOGGER = logging.getLogger(__name__)
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


def actor(named: str | None = None) -> str:
    """Who acts: `named`, else user@host; a user without a name is `uid <number>`."""
    if named:
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # containers run as numbers that /etc/passwd does not know
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()}"


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
            reason=_given(reason),
            by=redact(by),
            at=now(),
            forced=force,
        )
        registry.set_tags(number, {PENDING: record.model_dump_json()})
    if (previous := _existing(registry, record.previous)) is not None:
        _set_alias(registry, PREVIOUS, previous.number)
    _set_alias(registry, CHAMPION, number)
    _drop_challenger(registry, number)
    _finish(registry, version, record)
    return record


def rollback(registry: Registry, *, reason: str, by: str, to: int | None = None) -> AuditRecord:
    """Move `champion` back to `previous_champion`, or to version `to`, which must have served.

    A rollback that was cut off is finished first, with its own record; that is all unless `to` is
    another version. The version left behind is tagged `promotion.rolled_back`; `previous_champion`
    then names the champion before the restored one. Raises RegistryError when there is nothing to
    go back to.
    """
    reason, cut_off = _given(reason), _cut_off_rollback(registry)
    if to is not None and (cut_off is None or to != cut_off.version):
        _check_served(registry, to)
    if cut_off is not None:
        _move_back(registry, cut_off)
        if to in (None, cut_off.version):
            return cut_off
    record = _plan_rollback(registry, reason, redact(by), to)
    _move_back(registry, record)
    return record


def _cut_off_rollback(registry: Registry) -> AuditRecord | None:
    """The rollback that was begun and not finished, unless another move came after it."""
    current, moves = registry.aliases().get(CHAMPION), history(registry)
    last = moves[-1].at if moves else ""
    found = (_pending(version, current, "rollback") for version in registry.versions())
    alive = [
        record for record in found if record and (record.version == current or record.at > last)
    ]
    return max(alive, key=lambda record: record.at, default=None)


def _plan_rollback(registry: Registry, reason: str, by: str, to: int | None) -> AuditRecord:
    aliases = registry.aliases()
    current, target = aliases.get(CHAMPION), aliases.get(PREVIOUS) if to is None else to
    if target is None or (current is None and to is None):
        missing = "champion" if current is None else "previous champion"
        raise RegistryError(
            f"{registry.name} has no {missing} to roll back; name the version that shall serve."
        )
    if target == current:
        raise RegistryError(f"{registry.name}: version {target} is champion already.")
    return AuditRecord(
        action="rollback", version=target, previous=current, reason=reason, by=by, at=now()
    )


def _move_back(registry: Registry, record: AuditRecord) -> None:
    restored, left = registry.version(record.version), _existing(registry, record.previous)
    registry.set_tags(restored.number, {PENDING: record.model_dump_json()})
    if left is not None:
        tags = {"promotion.rolled_back": "true", "promotion.rolled_back_reason": record.reason}
        registry.set_tags(left.number, tags)
        _forget_intent(registry, left)
    before = _champion_before(registry, restored.number)
    _set_alias(registry, CHAMPION, restored.number)
    if before is not None:
        _set_alias(registry, PREVIOUS, before)
    elif PREVIOUS in registry.aliases():
        registry.client.delete_registered_model_alias(registry.name, PREVIOUS)
    _drop_challenger(registry, restored.number)
    _finish(registry, restored, record)


def history(registry: Registry) -> list[AuditRecord]:
    """Every promotion and rollback, oldest first."""
    places = [registry.model_tags(), *(version.tags for version in registry.versions())]
    records = {
        AuditRecord.model_validate_json(value)
        for tags in places
        for key, value in tags.items()
        if key.startswith(AUDIT)
    }
    return sorted(records, key=lambda record: record.at)


def _given(reason: str) -> str:
    """A reason as it goes on record. Raises RegistryError for an empty one."""
    if not reason.strip():
        raise RegistryError("The reason is empty; say why the champion shall move.")
    return redact(reason)


def _check_served(registry: Registry, number: int) -> None:
    registry.version(number)
    served = {registry.aliases().get(alias) for alias in (CHAMPION, PREVIOUS)}
    served.update(n for record in history(registry) for n in (record.version, record.previous))
    if number not in served:
        raise RegistryError(
            f"{registry.name} version {number} never served, so there is no going back to it. "
            "Promote it; `promote --force` overrules the gate."
        )


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
    """The champion that `number` once replaced, if it is still there and may serve."""
    earlier = [r for r in history(registry) if r.action == "promote" and r.version == number]
    before = _existing(registry, earlier[-1].previous) if earlier else None
    if before is None or before.number == number:
        return None
    return None if before.tags.get("promotion.rolled_back") == "true" else before.number


def _existing(registry: Registry, number: int | None) -> Version | None:
    """A version that may have been deleted since it was put on record."""
    return next((version for version in registry.versions() if version.number == number), None)


def _set_alias(registry: Registry, alias: str, number: int) -> None:
    registry.client.set_registered_model_alias(registry.name, alias, str(number))


def _drop_challenger(registry: Registry, number: int) -> None:
    if registry.aliases().get(CHALLENGER) == number:
        registry.client.delete_registered_model_alias(registry.name, CHALLENGER)


def _finish(registry: Registry, version: Version, record: AuditRecord) -> None:
    """Write the record on the version, the model and the run, then forget the intent.

    The model keeps it when the version is deleted.
    """
    text = record.model_dump_json()
    tags = {"promotion.rolled_back": "false"} if "promotion.rolled_back" in version.tags else {}
    names = ("action", "reason", "by", "at", "previous")
    promotion = {f"promotion.{name}": getattr(record, name) for name in names}
    registry.set_tags(version.number, {**promotion, **tags, record.key: text})
    registry.set_model_tag(f"{record.key}-{record.version}", text)
    if version.run_id:
        try:
            registry.client.log_text(version.run_id, text, f"audit/{record.key}.json")
        except Exception as error:  # noqa: BLE001 - a purged run must not block the move
            problem = redact(str(error))
            LOGGER.warning("%s has no copy on run %s: %s", record.key, version.run_id, problem)
    _forget_intent(registry, registry.version(version.number))


def _forget_intent(registry: Registry, version: Version) -> None:
    if PENDING in version.tags:
        registry.client.delete_model_version_tag(registry.name, str(version.number), PENDING)
