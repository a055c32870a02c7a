"""The result of the checks: findings, statistics and comparison, with a stable JSON form."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationError,
)

from rfdetr.checks.codes import ACTIONS, CODES, Action, Severity
from rfdetr.checks.samples import Samples
from rfdetr.data.ledger import SplitLedger, is_lost
from rfdetr.errors import DatasetError
from rfdetr.files import write_text_atomic

SCHEMA_VERSION = 1


def _portable(value: Any) -> Any:
    """Turn integers that JSON readers cannot represent into strings."""
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


Identifier = Annotated[int | str, BeforeValidator(_portable)]


class Finding(BaseModel):
    """One defect at one place. `file` is relative to the dataset folder; `line` counts from 1.

    `advice` and `repair`, what `--fix` does, have other keys in JSON: those of schema version 1.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    code: str
    severity: Severity
    message: str
    advice: str = Field(validation_alias="fix", serialization_alias="fix")
    split: str | None = None
    file: str | None = None
    line: int | None = None
    image_id: Identifier | None = None
    annotation_id: Identifier | None = None
    repair: str = Field(default="", validation_alias="mend", serialization_alias="mend")
    details: dict[str, Any] = Field(default_factory=dict)

    @property
    def action(self) -> Action:
        """What the user does about it: as its code says, but an error always needs something done,
        and a finding that --fix cannot repair has to be fixed at its source.
        """
        action = CODES[self.code].action
        needs_fix = (action == "repair" and not self.repair) or (
            action in ("decide", "info") and self.severity == "error"
        )
        return "fix" if needs_fix else action

    def place(self) -> str:
        """File, line and ids in one short string."""
        parts = [self.file or self.split or ""]
        if self.line is not None:
            parts[0] += f":{self.line}"
        if self.image_id is not None:
            parts.append(f"image {self.image_id}")
        if self.annotation_id is not None:
            parts.append(f"annotation {self.annotation_id}")
        return ", ".join(part for part in parts if part)


class SplitStatistics(BaseModel):
    """Statistics of one split. Box sizes are pixels after the square resize for the model.

    `median_box` is the median width and height in pixels of the image, `median_box_input` after
    the resize. `image_sizes` has the most frequent sizes, `other_image_sizes` the images of others.
    """

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
    image_sizes: dict[str, int] = Field(default_factory=dict)
    other_image_sizes: int = 0
    median_box: tuple[float, float] | None = None
    median_box_input: tuple[float, float] | None = None


class FindingGroup(NamedTuple):
    """The findings of a code that need the same action; `total` includes those not listed."""

    code: str
    findings: list[Finding]
    total: int


class LedgerTable(NamedTuple):
    """Accounts of files or annotation rows: (account, count per split), and the sums per split."""

    splits: list[str]
    rows: list[tuple[str, list[int]]]
    totals: list[int]


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

    `ledger` says for each split what becomes of every file and every annotation row in training;
    without image checks the files are left out. `counts` is the number of findings per code,
    including those beyond the listing limit.
    `fingerprints` maps split -> file name -> [content hash, hash of its boxes]; a later version of
    the dataset is compared with it. `samples` are for the page only: JSON leaves them out.
    """

    schema_version: int = SCHEMA_VERSION
    dataset: str
    layout: str
    variant: str = ""
    resolution: int = 0
    patch_size: int = 0
    images_checked: bool = True
    ledger: dict[str, SplitLedger] = Field(default_factory=dict)
    class_names: list[str] = Field(default_factory=list)
    annotation_files: dict[str, str] = Field(default_factory=dict)
    image_folders: dict[str, str] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    severities: dict[str, int] = Field(default_factory=dict)
    findings: list[Finding] = Field(default_factory=list)
    statistics: dict[str, SplitStatistics] = Field(default_factory=dict)
    comparison: Comparison | None = None
    fingerprints: dict[str, dict[str, tuple[str, str]]] = Field(default_factory=dict)
    samples: InstanceOf[Samples] = Field(default_factory=Samples, exclude=True, repr=False)

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
    def totals(self) -> str:
        """Number of findings of every severity as text."""
        numbers = ("error", self.errors), ("warning", self.warnings), ("note", self.infos)
        return ", ".join(f"{n:,} {name}{'' if n == 1 else 's'}" for name, n in numbers)

    @property
    def ok(self) -> bool:
        """Whether training may start: there are no errors."""
        return self.errors == 0

    @property
    def verdict(self) -> str:
        """Whether training may start, as one sentence."""
        if self.errors:
            return "Not ready for training."
        if self.warnings:
            return "Ready for training; review the warnings."
        return "Ready for training."

    def by_code(self) -> dict[str, list[Finding]]:
        """The listed findings grouped by code, in their order."""
        groups: dict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            groups[finding.code].append(finding)
        return dict(groups)

    def by_action(self) -> dict[Action, list[FindingGroup]]:
        """The listed findings grouped by what the user does about them, then by code.

        Findings beyond the listing limit count with the first group of their code.
        """
        groups: dict[Action, dict[str, list[Finding]]] = {action: {} for action in ACTIONS}
        for finding in self.findings:
            groups[finding.action].setdefault(finding.code, []).append(finding)
        unlisted = {code: self.counts[code] - len(found) for code, found in self.by_code().items()}
        return {
            action: [
                FindingGroup(code, found, len(found) + unlisted.pop(code, 0))
                for code, found in codes.items()
            ]
            for action, codes in groups.items()
            if codes
        }

    def ledger_table(self, kind: Literal["files", "rows"]) -> LedgerTable:
        """The ledgers of all splits side by side; what training does not use comes last."""
        accounts = {name: getattr(ledger, kind) for name, ledger in self.ledger.items()}
        names = list(dict.fromkeys(name for found in accounts.values() for name in found))
        names.sort(key=is_lost)
        rows = [(name, [found.get(name, 0) for found in accounts.values()]) for name in names]
        return LedgerTable(
            list(accounts), rows, [sum(found.values()) for found in accounts.values()]
        )

    def of(self, *codes: str) -> list[Finding]:
        """The listed findings with one of these codes."""
        return [finding for finding in self.findings if finding.code in codes]

    def to_json(self) -> str:
        """The report as JSON text, keys in a fixed order."""
        data = self.model_dump(mode="json", by_alias=True)
        try:
            return orjson.dumps(data, option=orjson.OPT_INDENT_2).decode()
        except TypeError:  # a file name that is not UTF-8
            return orjson.dumps(printable(data), option=orjson.OPT_INDENT_2).decode()

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `report.json` atomically."""
        write_text_atomic(path, self.to_json() + "\n")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a report; DatasetError if it is not a report or has another schema version."""
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
    """`value` with bytes of file names that are not UTF-8 written as backslash escapes."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [printable(item) for item in value]
    return value
