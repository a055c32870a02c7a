"""The records of the gate: scores of a model, the policy, the verdict with its rules."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator

from flows.config.sections import GateSettings
from rfdetr.evaluation.bootstrap import Interval, MatchEvidence

Outcome = Literal["promote", "refuse", "approval", "no-op"]
Evidence = Annotated[
    MatchEvidence,
    PlainValidator(lambda v: v if isinstance(v, MatchEvidence) else MatchEvidence.decode(v)),
    PlainSerializer(lambda evidence: evidence.encode(), return_type=str),
]


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="strings", arbitrary_types_allowed=True
    )


class ClassScore(_Record):
    """Average precision of one class and the number of its boxes in the test set."""

    ap: float
    boxes: int


class Scores(_Record):
    """One model, scored on one test set with one set of settings.

    `settings` is a key of everything that shapes the numbers: evaluate parameters and the version
    of the evaluator. `iou_type` tells boxes from masks. `evidence` (class axis: the test set's
    classes) allows the bootstrap.
    `export_parity` is None when the export was not compared with the weights.
    """

    model: str
    weights_sha256: str
    dataset_sha256: str
    settings: str
    iou_type: Literal["bbox", "segm"] = "bbox"
    class_names: tuple[str, ...]
    images: int
    metrics: dict[str, float]
    per_class: dict[str, ClassScore] = {}
    latency_ms: float | None = None
    size_mb: float | None = None
    export_parity: bool | None = None
    evidence: Evidence | None = None


class GatePolicy(GateSettings):
    """The `gate` section of params.yaml and what only one decision knows."""

    approved_by: str | None = None  # who gave the approval that `manual_approval` asks for
    rolled_back: str | None = None  # why the challenger was taken back after an earlier promotion


class Rule(_Record):
    """One rule of a verdict; `passed` is None where the rule does not apply."""

    name: str
    passed: bool | None
    observed: float | str | None = None
    limit: float | str | None = None
    reason: str


class Verdict(_Record):
    """The decision record: outcome, every rule, both sets of numbers (without evidence)."""

    outcome: Outcome
    reason: str
    rules: tuple[Rule, ...]
    challenger: Scores
    champion: Scores | None
    interval: Interval | None = None
    policy: GatePolicy

    @property
    def promote(self) -> bool:
        """Whether the challenger becomes champion now."""
        return self.outcome == "promote"

    @property
    def champion_version(self) -> int | None:
        """The registered version that was compared with; None when there was no champion."""
        known = re.fullmatch(r"version (\d+)", self.champion.model) if self.champion else None
        return int(known[1]) if known else None

    def to_markdown(self) -> str:
        """The verdict as a table for people."""
        marks = {True: "pass", False: "FAIL", None: "-"}
        lines = [
            f"**{self.outcome}**: {self.reason}",
            "",
            "| Rule | Result | Observed | Limit | Why |",
            "|---|---|---|---|---|",
        ]
        for rule in self.rules:
            cells = (rule.name, marks[rule.passed], rule.observed, rule.limit, rule.reason)
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
        return "\n".join(lines) + "\n"


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
