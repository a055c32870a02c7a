"""Moves the alias `champion`: promotion, rollback, and the audit record of each move.

A move takes several calls to MLflow, and the process may be killed between any two of them. So the
record of the move is first stored as the tag `promotion.pending` (the intent) of the version that
becomes champion. Repeating the command then depends on three things:

| intent          | champion alias           | audit record | action                              |
|-----------------|--------------------------|--------------|-------------------------------------|
| none            | any                      | any          | a new move                          |
| present         | the previous champion    | missing      | interrupted: redo it, same record   |
| present         | the version itself       | any          | interrupted: finish it, same record |
| present         | anything else            | any          | outdated: ignore it, a new move     |

An intent next to its audit record and the previous champion is outdated too: the move was finished,
and later undone.
"""

from __future__ import annotations

import logging
from typing import Literal

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
from flows.release.audit import PENDING, AuditRecord, history, record_of

LOGGER = logging.getLogger(__name__)


class ChampionChangedError(RegistryError):
    """The champion is not the one that the gate compared with; run the gate again."""


def promote(
    registry: Registry,
    number: int,
    *,
    reason: str,
    by: str,
    expected_champion: int | Literal["any", "judged"] | None = "any",
    force: bool = False,
) -> AuditRecord | None:
    """Make a version champion; the old champion becomes `previous_champion`.

    Returns None if the version is champion already. `expected_champion` is the version that the
    gate compared with: a number, None for no champion, or `judged` for the one in the version's
    verdict. ChampionChangedError is raised if the champion is another one. A version that the gate
    refused, or that was rolled back, needs `force`.
    """
    version, current = registry.version(number), registry.aliases().get(CHAMPION)
    record = _interrupted(version, current, "promote")
    if record is None:
        if current == number:
            _drop_challenger(registry, number)
            return None
        if not force:
            _check_allowed(registry.name, version)
            if expected_champion == "judged":
                expected_champion = _judged_against(registry.name, version)
            _check_champion(registry.name, number, current, expected_champion)
        record = AuditRecord(
            action="promote",
            version=number,
            previous=current,
            reason=_checked_reason(reason),
            by=redact(by),
            at=now(),
            forced=force,
        )
        registry.set_tags(number, {PENDING: record.model_dump_json()})
    if (previous := _existing(registry, record.previous)) is not None:
        registry.set_alias(PREVIOUS, previous.number)
    registry.set_alias(CHAMPION, number)
    _drop_challenger(registry, number)
    _finish(registry, version, record)
    return record


def rollback(registry: Registry, *, reason: str, by: str, to: int | None = None) -> AuditRecord:
    """Move `champion` back to `previous_champion`, or to version `to`, a former champion.

    An interrupted rollback is finished first, with its own record; if it leads to the requested
    version, that is all. The version left behind is tagged `promotion.rolled_back`, and
    `previous_champion` becomes the champion before the restored one. Raises RegistryError if there
    is no version to roll back to.
    """
    reason, interrupted = _checked_reason(reason), _interrupted_rollback(registry)
    if to is not None and (interrupted is None or to != interrupted.version):
        _check_served(registry, to)
    if interrupted is not None:
        _move_back(registry, interrupted)
        if to in (None, interrupted.version):
            return interrupted
    record = _plan_rollback(registry, reason, redact(by), to)
    _move_back(registry, record)
    return record


def _interrupted_rollback(registry: Registry) -> AuditRecord | None:
    """The rollback that was started and not finished, unless it was followed by another move."""
    current, moves = registry.aliases().get(CHAMPION), history(registry)
    last_move = moves[-1].at if moves else ""
    found = (_interrupted(v, current, "rollback") for v in registry.tagged({PENDING: None}))
    valid = [r for r in found if r and (r.version == current or r.at > last_move)]
    return max(valid, key=lambda record: record.at, default=None)


def _plan_rollback(registry: Registry, reason: str, by: str, to: int | None) -> AuditRecord:
    aliases = registry.aliases()
    current, target = aliases.get(CHAMPION), aliases.get(PREVIOUS) if to is None else to
    if target is None or (current is None and to is None):
        missing = "champion" if current is None else "previous champion"
        raise RegistryError(
            f"{registry.name} has no {missing} to roll back; give the version to restore."
        )
    if target == current:
        raise RegistryError(f"{registry.name}: version {target} is already champion.")
    return AuditRecord(
        action="rollback", version=target, previous=current, reason=reason, by=by, at=now()
    )


def _move_back(registry: Registry, record: AuditRecord) -> None:
    """Carry out a rollback; every step can be repeated."""
    restored, left = registry.version(record.version), _existing(registry, record.previous)
    registry.set_tags(restored.number, {PENDING: record.model_dump_json()})
    if left is not None:
        tags = {"promotion.rolled_back": "true", "promotion.rolled_back_reason": record.reason}
        registry.set_tags(left.number, tags)
        _drop_intent(registry, left)
    before = _champion_before(registry, restored.number)
    registry.set_alias(CHAMPION, restored.number)
    if before is not None:
        registry.set_alias(PREVIOUS, before)
    elif PREVIOUS in registry.aliases():
        registry.delete_alias(PREVIOUS)
    _drop_challenger(registry, restored.number)
    _finish(registry, restored, record)


def lost_champion(registry: Registry) -> int | None:
    """The last champion, if the alias `champion` was removed by hand and the version exists."""
    if CHAMPION in registry.aliases():
        return None
    moves = history(registry)
    return moves[-1].version if moves and registry.exists(moves[-1].version) else None


def restore_champion(registry: Registry) -> int | None:
    """Point `champion` at the last champion again if the alias was removed; returns its version."""
    number = lost_champion(registry)
    if number is not None:
        registry.set_alias(CHAMPION, number)
        _drop_challenger(registry, number)
    return number


def _checked_reason(reason: str) -> str:
    """A reason without secrets. Raises RegistryError if it is empty."""
    if not reason.strip():
        raise RegistryError("The reason is empty; give a reason for changing the champion.")
    return redact(reason)


def _check_served(registry: Registry, number: int) -> None:
    registry.version(number)
    served = {registry.aliases().get(alias) for alias in (CHAMPION, PREVIOUS)}
    served.update(n for record in history(registry) for n in (record.version, record.previous))
    if number not in served:
        raise RegistryError(
            f"{registry.name} version {number} never served, so it cannot be restored. "
            "Promote it instead; `promote --force` overrides the gate."
        )


def _check_allowed(name: str, version: Version) -> None:
    outcome = version.tags.get("gate.outcome")
    if outcome == "refuse":
        raise RegistryError(
            f"{name} version {version.number} was refused by the gate: "
            f"{version.tags.get('gate.reason')}. `promote --force` overrides this."
        )
    if version.tags.get("promotion.rolled_back") == "true":
        raise RegistryError(
            f"{name} version {version.number} was rolled back: "
            f"{version.tags.get('promotion.rolled_back_reason')}. `promote --force` overrides this."
        )


def _judged_against(name: str, version: Version) -> int | Literal["any"] | None:
    """The champion in the verdict of a version; `any` for verdicts that did not record it."""
    if "gate.outcome" not in version.tags:
        raise RegistryError(
            f"{name} version {version.number} was not judged by the gate. Run "
            "`rfdetr-pipeline register`, or promote with --force to skip the gate."
        )
    known = version.tags.get("gate.champion_version", "any")
    if known == "any":
        return "any"
    if known == "none":
        return None
    if not known.isdecimal():
        raise RegistryError(
            f"{name} version {version.number}: the tag gate.champion_version is {known!r}, not a "
            "version. Run `rfdetr-pipeline register`, which judges again, or promote with --force."
        )
    return int(known)


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


def _interrupted(version: Version, champion: int | None, action: str) -> AuditRecord | None:
    """The interrupted move that made a version champion, if it can still be finished.

    See the table at the top of this module.
    """
    text = version.tags.get(PENDING)
    if not text:
        return None
    record = record_of(f"version {version.number}", PENDING, text)
    if record is None:
        return None
    moved = champion == record.version
    not_moved = champion == record.previous and record.key not in version.tags
    return record if record.action == action and (moved or not_moved) else None


def _champion_before(registry: Registry, number: int) -> int | None:
    """The champion that `number` once replaced, if it exists and was not rolled back."""
    earlier = [r for r in history(registry) if r.action == "promote" and r.version == number]
    before = _existing(registry, earlier[-1].previous) if earlier else None
    if before is None or before.number == number:
        return None
    return None if before.tags.get("promotion.rolled_back") == "true" else before.number


def _existing(registry: Registry, number: int | None) -> Version | None:
    """The version, or None if it was deleted."""
    return registry.version(number) if number is not None and registry.exists(number) else None


def _drop_challenger(registry: Registry, number: int) -> None:
    if registry.aliases().get(CHALLENGER) == number:
        registry.delete_alias(CHALLENGER)


def _finish(registry: Registry, version: Version, record: AuditRecord) -> None:
    """Store the record on the version, the registered model and the run, then drop the intent.

    The copy on the registered model remains if the version is deleted.
    """
    text = record.model_dump_json()
    tags = {"promotion.rolled_back": "false"} if "promotion.rolled_back" in version.tags else {}
    names = ("action", "reason", "by", "at", "previous")
    promotion = {f"promotion.{name}": getattr(record, name) for name in names}
    registry.set_tags(version.number, {**promotion, **tags, record.key: text})
    registry.set_model_tag(f"{record.key}-{record.version}", text)
    try:
        registry.log_text(version, text, f"audit/{record.key}.json")
    except Exception as error:  # noqa: BLE001 - a deleted run must not block the move
        problem = redact(str(error))
        LOGGER.warning("%s has no copy on run %s: %s", record.key, version.run_id, problem)
    _drop_intent(registry, registry.version(version.number))


def _drop_intent(registry: Registry, version: Version) -> None:
    if PENDING in version.tags:
        registry.delete_tag(version.number, PENDING)
