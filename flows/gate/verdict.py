"""Records of the gate: the scores of a model, the policy, and the verdict with its rules."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import BaseModel, ConfigDict

from flows.config.sections import GateEvidence, GateSettings
from rfdetr.evaluation.bootstrap import Interval
from rfdetr.evaluation.calibration import Calibration
from rfdetr.evaluation.error_types import ErrorTypes
from rfdetr.evaluation.evidence import MatchEvidence
from rfdetr.evaluation.slices import Slice
from rfdetr.evaluation.suspects import Kind

Box = tuple[float, float, float, float]
Outcome = Literal["promote", "refuse", "approval", "no-op"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ClassScore(_Record):
    """Average precision of one class and the number of its boxes in the test set."""

    ap: float
    boxes: int


class SliceChange(_Record):
    """Challenger minus champion on one slice, in mAP, with the ends of its 95 % interval."""

    change: float
    lower: float
    upper: float


class ClassAtPoint(_Record):
    """The threshold of a class, and what it gives on the test set at IoU 0.5.

    `shared`: the class has few boxes and shares its threshold; `reached`: whether the target was
    met on the split that the threshold was chosen on.
    """

    threshold: float
    shared: bool
    reached: bool
    precision: float
    recall: float


class AtPoint(_Record):
    """What the operating point gives on the test set at IoU 0.5.

    `f1`, `precision` and `recall` are means over the classes with boxes, `false_alarms` are wrong
    detections per image, and `detections` counts all accepted ones. `note` says which classes miss
    the target and what was chosen instead.
    """

    target: str
    chosen_on: str
    f1: float
    precision: float
    recall: float
    false_alarms: float
    detections: int
    note: str
    classes: dict[str, ClassAtPoint]


class SuspectedLabel(_Record):
    """One label that is probably wrong. Boxes are x, y, width, height in pixels of the file.

    `label` and `box` are those in the dataset, None if the label is missing; `proposal` and
    `proposed_box` what the model says, None where it sees nothing; `score` is that of its
    detection, `annotation` the number of the label within its image.
    """

    image: str
    image_id: int
    kind: Kind
    suspicion: float
    label: str | None = None
    box: Box | None = None
    annotation: int | None = None
    proposal: str | None = None
    proposed_box: Box | None = None
    score: float | None = None


class Scores(_Record):
    """The scores of one model on one test set.

    `settings` identifies the evaluate parameters and the version of the evaluator; scores with
    different settings are not comparable. `metrics` are COCO-style numbers from 0 to 1,
    `latency_ms` is per image, measured on `latency_on`; `size_mb` counts 10^6 bytes. `evidence`
    holds the matches per image and class that the bootstrap resamples. `export_parity` is None if
    the ONNX export was not compared with the weights. `slices` are in the order of params.yaml.
    `operating_point` is None unless `evaluate.operating_point` is set. `suspected_labels` counts
    the labels of the test set that are strongly suspected to be wrong, `suspects` are the first.
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
    latency_on: str | None = None
    size_mb: float | None = None
    export_parity: bool | None = None
    evidence: MatchEvidence | None = None
    slices: dict[str, Slice] = {}
    operating_point: AtPoint | None = None
    calibration: Calibration | None = None
    error_types: ErrorTypes | None = None
    suspected_labels: int | None = None
    suspects: tuple[SuspectedLabel, ...] = ()

    def without_evidence(self) -> Scores:
        """The numbers alone, without what is recorded per image."""
        slices = {
            name: dataclasses.replace(found, members=None, evidence=None)
            for name, found in self.slices.items()
        }
        return self.model_copy(update={"evidence": None, "slices": slices})


class GatePolicy(GateSettings):
    """The `gate` section of params.yaml, and facts about this challenger and the champion."""

    rolled_back: str | None = None  # reason, if the challenger was promoted before and rolled back
    champion_origin: str | None = None  # version and dataset of a champion of another dataset


class Rule(_Record):
    """One rule of a verdict; `passed` is None where the rule does not apply."""

    name: str
    passed: bool | None
    observed: float | str | None = None
    limit: float | str | None = None
    reason: str


class Verdict(_Record):
    """The decision: outcome, every rule, and both sets of scores (without evidence).

    `champion_version` is the registered version that the challenger was compared with; None if
    there was no champion. `interval` is the paired interval of the primary metric, whatever
    `gate.evidence` is, and `other_evidence` what the gate would have decided with its other two
    values. `images_needed` is how many test images would decide if the observed difference stays;
    None if the test set is large enough. `slices` has the change of each slice.
    """

    outcome: Outcome
    reason: str
    rules: tuple[Rule, ...]
    challenger: Scores
    champion: Scores | None
    champion_version: int | None = None
    interval: Interval | None = None
    images_needed: int | None = None
    other_evidence: dict[GateEvidence, Outcome] = {}
    slices: dict[str, SliceChange] = {}
    policy: GatePolicy

    @property
    def promote(self) -> bool:
        """Whether the challenger becomes champion now."""
        return self.outcome == "promote"

    def to_markdown(self) -> str:
        """The verdict as a Markdown table."""
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
        if self.other_evidence:
            others = ", ".join(f"`{kind}`: {out}" for kind, out in self.other_evidence.items())
            lines += ["", f"Decided by `{self.policy.evidence}`. By other evidence: {others}."]
        return "\n".join(lines) + "\n"


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
