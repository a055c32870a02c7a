"""The result of the checks: findings, statistics and comparison, with a stable JSON form."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Self

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rfdetr.checks.codes import CODES, SEVERITIES, Severity
from rfdetr.checks.options import CheckConfig
from rfdetr.errors import DatasetError
from rfdetr.files import write_text_atomic

SCHEMA_VERSION = 1


def _portable(value: Any) -> Any:
    """Integers that JSON readers cannot hold become texts."""
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


Identifier = Annotated[int | str, BeforeValidator(_portable)]


class Finding(BaseModel):
    """One defect at one place. `file` is relative to the dataset folder; `line` counts from 1."""

    model_config = ConfigDict(frozen=True)

    code: str
    severity: Severity
    message: str
    fix: str
    split: str | None = None
    file: str | None = None
    line: int | None = None
    image_id: Identifier | None = None
    annotation_id: Identifier | None = None
    mend: str = ""
    details: dict[str, Any] = Field(default_factory=dict)

    def place(self) -> str:
        """File, line and ids as one short text."""
        parts = [self.file or self.split or ""]
        if self.line is not None:
            parts[0] += f":{self.line}"
        if self.image_id is not None:
            parts.append(f"image {self.image_id}")
        if self.annotation_id is not None:
            parts.append(f"annotation {self.annotation_id}")
        return ", ".join(part for part in parts if part)


class SplitStatistics(BaseModel):
    """Numbers of one split. Box sizes are pixels after the square resize to the model's input."""

    images: int = 0
    images_without_boxes: int = 0
    boxes: int = 0
    crowd_regions: int = 0
    boxes_per_image: dict[str, int] = Field(default_factory=dict)
    boxes_per_image_mean: float = 0.0
    boxes_per_image_max: int = 0
    class_counts: dict[str, int] = Field(default_factory=dict)
    imbalance: float | None = None
    box_side_histogram: dict[str, int] = Field(default_factory=dict)
    box_side_percentiles: dict[str, float] = Field(default_factory=dict)
    boxes_below_patch: int = 0
    colour_mean: tuple[float, float, float] | None = None


class Comparison(BaseModel):
    """What changed since a previous version of the dataset, by file name and content."""

    previous: str = ""
    content_compared: bool = True
    images_added: int = 0
    images_removed: int = 0
    images_changed: int = 0
    annotations_changed: int = 0
    class_count_shift: dict[str, int] = Field(default_factory=dict)
    class_share_shift: dict[str, float] = Field(default_factory=dict)
    examples: dict[str, list[str]] = Field(default_factory=dict)


class DatasetReport(BaseModel):
    """Every finding of one dataset, in a fixed order, with its statistics.

    `counts` holds the number of findings per code, also of those beyond the listing limit.
    `fingerprints` maps split -> file name -> [content hash, hash of its boxes]; a later version is
    compared with it.
    """

    schema_version: int = SCHEMA_VERSION
    dataset: str
    layout: str
    variant: str = ""
    resolution: int = 0
    patch_size: int = 0
    images_checked: bool = True
    class_names: list[str] = Field(default_factory=list)
    annotation_files: dict[str, str] = Field(default_factory=dict)
    image_folders: dict[str, str] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    severities: dict[str, int] = Field(default_factory=dict)
    findings: list[Finding] = Field(default_factory=list)
    statistics: dict[str, SplitStatistics] = Field(default_factory=dict)
    comparison: Comparison | None = None
    fingerprints: dict[str, dict[str, tuple[str, str]]] = Field(default_factory=dict)

    @property
    def errors(self) -> int:
        """Number of findings with severity error."""
        return self.severities.get("error", 0)

    @property
    def warnings(self) -> int:
        """Number of findings with severity warning."""
        return self.severities.get("warning", 0)

    @property
    def infos(self) -> int:
        """Number of findings with severity info."""
        return self.severities.get("info", 0)

    @property
    def ok(self) -> bool:
        """Whether training may start: no finding is an error."""
        return self.errors == 0

    def of(self, *codes: str) -> list[Finding]:
        """The listed findings with one of these codes."""
        return [finding for finding in self.findings if finding.code in codes]

    def to_json(self) -> str:
        """The report as JSON text, keys in a fixed order."""
        data = self.model_dump(mode="json")
        try:
            return orjson.dumps(data, option=orjson.OPT_INDENT_2).decode()
        except TypeError:  # a file name that is not UTF-8
            return orjson.dumps(printable(data), option=orjson.OPT_INDENT_2).decode()

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `report.json` in one step."""
        write_text_atomic(path, self.to_json() + "\n")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a report; DatasetError when the file is none or of another schema version."""
        try:
            data = orjson.loads(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: not a readable report ({error}).") from error
        if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
            raise DatasetError(
                f"{path}: not a dataset report of schema version {SCHEMA_VERSION}. "
                "Run the checks again on that version of the dataset."
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise DatasetError(f"{path}: not a dataset report ({error}).") from error


def printable(value: Any) -> Any:
    """`value` with each byte of a file name that is no UTF-8 spelt out as a backslash escape."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable(item) for item in value]
    return value


class Collector:
    """Gathers findings: applies silence, severity and the listing limit, counts everything."""

    def __init__(self, config: CheckConfig) -> None:
        self.config = config
        self.counts: Counter[str] = Counter()
        self._silent = frozenset(config.silence)
        self._noted: Counter[str] = Counter()
        self._findings: list[Finding] = []

    def add(self, code: str, message: str, **where: Any) -> None:
        """Record one finding; `where` holds the further fields of `Finding`."""
        for _ in self.take(code, (None,)):
            self.note(code, message, **where)

    def take(self, code: str, places: Any) -> Any:
        """Count all `places` (a sequence or array) and return those that are still to be noted."""
        if code in self._silent or len(places) == 0:
            return places[:0]
        self.counts[code] += len(places)
        return places[: max(0, self.config.max_findings_per_code - self._noted[code])]

    def note(self, code: str, message: str, **where: Any) -> None:
        """List a finding that `take` has counted."""
        self._noted[code] += 1
        message, where = printable(message), printable(where)
        info = CODES[code]
        where.setdefault("mend", info.mend)
        self._findings.append(
            Finding(
                code=code,
                severity=self.config.severity_of(code),
                message=message,
                fix=info.fix,
                **where,
            )
        )

    def findings(self) -> list[Finding]:
        """All listed findings: errors first, then by code, split, file, line and ids."""
        return sorted(self._findings, key=_sort_key)

    def severities(self) -> dict[str, int]:
        """Number of findings per severity, all three named."""
        total = dict.fromkeys(SEVERITIES, 0)
        for code, count in self.counts.items():
            total[self.config.severity_of(code)] += count
        return {str(name): count for name, count in total.items()}


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
