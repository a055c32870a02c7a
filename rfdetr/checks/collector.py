"""Gathers the findings of a check: severities, silenced codes, the listing limit, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from rfdetr.arrays import Integers
from rfdetr.checks.codes import CODES, SEVERITIES, Severity
from rfdetr.checks.dataset_report import Finding, printable
from rfdetr.checks.options import CheckConfig
from rfdetr.checks.table import SplitTable


class Collector:
    """Applies silence, severity and the listing limit to findings, and counts all of them."""

    def __init__(self, config: CheckConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._levels: Counter[Severity] = Counter()
        self._silent = frozenset(config.silence)
        self._listed: Counter[str] = Counter()
        self._findings: list[Finding] = []

    def add(self, code: str, message: str, **fields: Any) -> None:
        """Record one finding; `fields` are further fields of `Finding`."""
        for _ in self.take(code, (None,), fields.get("severity")):
            self.note(code, message, **fields)

    def add_images(
        self, table: SplitTable, code: str, rows: Integers, message: Callable[[int], str]
    ) -> None:
        """Record a finding for each of these image records."""
        listed: list[int] = self.take(code, rows).tolist()
        for row in listed:
            details = table.image_details(row)
            self.note(code, message(row), details=details, **table.image_place(row))

    def add_annotations(
        self,
        table: SplitTable,
        code: str,
        rows: Integers,
        message: Callable[[int], str],
        severity: Severity | None = None,
    ) -> None:
        """Record a finding for each of these annotations; the image's name is added."""
        listed: list[int] = self.take(code, rows, severity).tolist()
        if not listed:  # line numbers may take reading the file
            return
        for row, place in zip(listed, table.annotation_places(listed), strict=True):
            text = f"{message(row)} ({table.image_name(row)})"
            details = table.annotation_details(row)
            self.note(code, text, severity=severity, details=details, **place)

    def take(self, code: str, places: Any, severity: Severity | None = None) -> Any:
        """Count all `places` (a sequence or array); return those still to be listed by `note`.

        `severity` is that of these places, unless the configuration sets the severity of the code.
        """
        if code in self._silent or len(places) == 0:
            return places[:0]
        self.counts[code] += len(places)
        self._levels[self.config.severity_of(code, severity)] += len(places)
        return places[: max(0, self.config.max_findings_per_code - self._listed[code])]

    def note(
        self, code: str, message: str, *, severity: Severity | None = None, **fields: Any
    ) -> None:
        """List a finding that `take` has counted."""
        self._listed[code] += 1
        info = CODES[code]
        self._findings.append(
            Finding(
                code=code,
                severity=self.config.severity_of(code, severity),
                message=printable(message),
                advice=info.advice,
                **{"repair": info.repair, **printable(fields)},
            )
        )

    def findings(self) -> list[Finding]:
        """All listed findings: errors first, then by code, split, file, line and ids."""
        return sorted(self._findings, key=_sort_key)

    def severities(self) -> dict[str, int]:
        """Number of findings of every severity."""
        return {severity: self._levels[severity] for severity in SEVERITIES}


def _sort_key(finding: Finding) -> tuple[Any, ...]:
    return (
        SEVERITIES.index(finding.severity),
        finding.code,
        finding.split or "",
        finding.file or "",
        finding.line or 0,
        str(finding.image_id or "").rjust(20),
        str(finding.annotation_id or "").rjust(20),
        finding.message,
    )
