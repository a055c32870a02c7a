"""The model card of a registered version: what it is for, data, numbers, limits, lineage.

Every number comes from a record of the pipeline: model.json, validation.json, the image profile,
the verdict of the gate, and the audit record of the promotion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from flows.gate import report
from flows.gate.report import Section
from flows.gate.verdict import Scores, Verdict
from flows.release.audit import AuditRecord
from rfdetr.monitoring.image_profile import ImageProfile

FEW_BOXES = 50


class Card(NamedTuple):
    """A card without its last section, which says whether and why the version was promoted.

    `judged` is that section for a version that was not promoted.
    """

    heading: str
    intro: str
    sections: list[Section]
    judged: Section

    def files(
        self, promotion: AuditRecord | None = None, replaced: AuditRecord | None = None
    ) -> dict[str, str]:
        """The card as {"card.md": ..., "card.html": ...}.

        `replaced` is the move that made another version champion afterwards.
        """
        last = self.judged if promotion is None else _promotion(promotion, replaced)
        found = [*self.sections, last]
        return {
            "card.md": report.to_markdown(self.heading, self.intro, found),
            "card.html": report.to_html(self.heading, self.intro, found),
        }

    def to_json(self) -> str:
        """The card as it is stored, to be completed by a later promotion."""
        return _STORED.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Card:
        """The inverse of `to_json`. Raises ValueError for any other text."""
        return _STORED.validate_json(text)


_STORED = TypeAdapter(Card)


def make_card(
    name: str,
    number: int,
    card: Mapping[str, Any],
    verdict: Verdict,
    *,
    validation: Mapping[str, Any] | None = None,
    profile: ImageProfile | None = None,
) -> Card:
    """The card of a version, from its records."""
    found = [
        _purpose(card),
        *_data(card, validation),
        *report.sections(verdict.challenger, verdict),
        *_profile(profile),
        _limits(card, verdict.challenger),
        _lineage(card, verdict),
    ]
    intro = (
        f"RF-DETR {card['variant']} for {len(card['class_names'])} classes, trained on "
        f"{card['dataset']['name']} and measured on {verdict.challenger.images} images."
    )
    rows = [["Gate", f"{verdict.outcome}: {verdict.reason}"]]
    judged = Section("Promotion", "This version is not champion.", ("", "Result"), rows)
    return Card(f"{name} version {number}", intro, found, judged)


def _purpose(card: Mapping[str, Any]) -> Section:
    classes = ", ".join(map(str, card["class_names"]))
    text = (
        "Finds objects of these classes in images like those of its dataset. It was not tested on "
        "other images, and it is not a basis for decisions about people."
    )
    rows = [
        ["Classes", classes],
        ["Model", f"RF-DETR {card['variant']}, {card['resolution']} pixels"],
        ["Epochs", f"{card['epochs']}, the best was {card['best']['epoch']}"],
    ]
    return Section("Purpose", text, ("", "Result"), rows)


def _data(card: Mapping[str, Any], validation: Mapping[str, Any] | None) -> Iterator[Section]:
    ledger = (validation or {}).get("ledger") or {}
    if not ledger:
        return
    text = f"Dataset {card['dataset']['name']}, content {card['dataset']['digest'][:12]}."
    rows = [
        [split, str(found["images"]), str(found["rows"].get("trained", 0)), _rest(found)]
        for split, found in ledger.items()
    ]
    yield Section("Data", text, ("Split", "Images", "Objects", "Not used"), rows)


def _rest(found: Mapping[str, Any]) -> str:
    """What the ledger of a split does not use, by reason."""
    used = ("trained", "trained with objects", "trained as background", "annotation file")
    rest = {**found["files"], **found["rows"]}
    return ", ".join(f"{reason}: {count}" for reason, count in rest.items() if reason not in used)


def _profile(profile: ImageProfile | None) -> Iterator[Section]:
    if profile is None:
        return
    rows = []
    for name, values in profile.features.items():
        if len(values):
            low, middle, high = np.percentile(values, [5, 50, 95]).tolist()
            rows.append([name.replace("_", " "), *map(report.number, (low, middle, high))])
    text = (
        "The command rfdetr-pipeline drift compares recent images with this profile of "
        f"{len(profile.files)} training images."
    )
    yield Section("Drift profile", text, ("Feature", "5 %", "Median", "95 %"), rows)


def _limits(card: Mapping[str, Any], scores: Scores) -> Section:
    rows = [
        [name, f"AP {found.ap:.4f} from only {found.boxes} boxes: uncertain"]
        for name, found in scores.per_class.items()
        if found.boxes < FEW_BOXES
    ]
    untested = [name for name in card["class_names"] if name not in scores.per_class]
    rows += [[str(name), "no boxes in the test set: not measured"] for name in untested]
    weakest = sorted(scores.per_class.items(), key=lambda item: item[1].ap)[:1]
    rows += [[name, f"the weakest class: AP {found.ap:.4f}"] for name, found in weakest]
    slices = [(n, s.map_50_95) for n, s in scores.slices.items() if s.map_50_95 is not None]
    rows += [
        [name, f"the weakest slice: mAP {value:.4f}"]
        for name, value in sorted(slices, key=lambda item: item[1])[:1]
    ]
    if scores.suspected_labels:
        reason = "test labels are probably wrong: the numbers are a little too low or too high"
        rows.append(["Test set", f"{scores.suspected_labels} {reason}"])
    return Section("Limits", "", ("Where", "Result"), rows)


def _lineage(card: Mapping[str, Any], verdict: Verdict) -> Section:
    source = card.get("source", {}).get("source") or "random weights"
    rows = [
        ["Weights (SHA-256)", str(card["weights_sha256"])],
        ["Dataset (content)", str(card["dataset"]["digest"])],
        ["Test set (content)", verdict.challenger.dataset_sha256],
        ["Started from", str(source)],
        ["Git commit", str(card.get("git_commit") or "none")],
        ["MLflow run", str(card.get("mlflow_run_id") or "none")],
        *([name, str(version)] for name, version in card.get("packages", {}).items()),
    ]
    return Section("Lineage", "", ("", "Result"), rows)


def _promotion(promotion: AuditRecord, replaced: AuditRecord | None) -> Section:
    rows = [
        ["Action", promotion.action + (" (gate overruled)" if promotion.forced else "")],
        ["By", promotion.by],
        ["At", promotion.at],
        ["Reason", promotion.reason],
        ["Champion before", str(promotion.previous or "none")],
    ]
    if replaced is not None:
        how = "rolled back to" if replaced.action == "rollback" else "replaced by"
        rows.append(["Champion until", replaced.at])
        rows.append([f"Then {how}", f"version {replaced.version}: {replaced.reason}"])
    return Section("Promotion", "", ("", "Result"), rows)
