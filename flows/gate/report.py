"""The evaluation report in Markdown and HTML, made of the scores and, after the gate, the verdict.

A report is a list of `Section`s; both formats show the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from flows.gate.suspected_labels import crops
from flows.gate.verdict import AtPoint, Scores, Verdict
from rfdetr.checks.markdown import markdown_text
from rfdetr.evaluation.calibration import LOWEST_SCORE, Calibration
from rfdetr.evaluation.error_types import ErrorTypes
from rfdetr.evaluation.slices import Slice
from rfdetr.files import write_text_atomic

HTML = ".html"


class Bars(NamedTuple):
    """Grouped horizontal bars: for each label one value of at least 0 per series."""

    title: str
    series: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float]]]

    @property
    def longest(self) -> float:
        """The highest value, to which the bars are scaled."""
        return max((value for _, values in self.rows for value in values), default=0.0) or 1.0


class Section(NamedTuple):
    """A heading, a paragraph, and a table whose first column is text and whose others are numbers.

    HTML also draws `curve`, points (x, y) in 0..1 against the diagonal, `bars`, and `pictures`,
    each a data URL and a caption.
    """

    title: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    curve: Sequence[tuple[float, float]] = ()
    bars: Bars | None = None
    pictures: Sequence[tuple[str, str]] = ()


def write_report(
    scores: Scores,
    target: Path,
    *,
    title: str,
    verdict: Verdict | None = None,
    images: Path | None = None,
) -> None:
    """Write the report as `target` (.md) and beside it as .html, atomically.

    `verdict` adds the comparison with the champion, the dataset folder `images` crops of suspects.
    """
    heading = f"Evaluation: {title}"
    on = f"; measured on {scores.latency_on}" if scores.latency_on else ""
    intro = f"{scores.images} images{on}."
    found = list(sections(scores, verdict, images))
    write_text_atomic(target, to_markdown(heading, intro, found))
    write_text_atomic(target.with_suffix(HTML), to_html(heading, intro, found))


def sections(
    scores: Scores, verdict: Verdict | None = None, images: Path | None = None
) -> Iterator[Section]:
    """The sections of the report, without those that have nothing to show."""
    champion = verdict.champion if verdict else None
    if verdict is not None:
        yield _decision(verdict)
    yield _metrics(scores, champion)
    yield _classes(scores, champion)
    if scores.slices:
        yield _slices(scores, verdict)
    if scores.operating_point is not None:
        yield _operating_point(scores.operating_point, scores.per_class)
    if scores.error_types is not None:
        yield _error_types(scores.error_types, champion.error_types if champion else None)
    if scores.suspects or scores.suspected_labels:
        yield _suspects(scores, images)
    if scores.calibration is not None and scores.calibration.ece is not None:
        yield _calibration(scores.calibration)


def _decision(verdict: Verdict) -> Section:
    marks = {True: "pass", False: "FAIL", None: "-"}
    rows = [(rule.name, marks[rule.passed], rule.reason) for rule in verdict.rules]
    text = f"{verdict.outcome}: {verdict.reason}."
    return Section("Decision of the gate", text, ("Rule", "Result", "Why"), rows)


def _metrics(scores: Scores, champion: Scores | None) -> Section:
    values: dict[str, float | None] = {**scores.metrics, "latency_ms": scores.latency_ms}
    values["size_mb"] = scores.size_mb
    old: dict[str, float | None] = {}
    if champion is not None:
        old = {**champion.metrics, "latency_ms": champion.latency_ms, "size_mb": champion.size_mb}
    header = ["Metric", "Model"] + (["Champion"] if champion else [])
    rows = [
        [name, number(value), *([number(old.get(name))] if champion else [])]
        for name, value in values.items()
    ]
    return Section("Metrics", "", header, rows)


def _classes(scores: Scores, champion: Scores | None) -> Section:
    header = ["Class", "Boxes", "AP"] + (["AP of the champion"] if champion else [])
    rows = []
    for name, found in scores.per_class.items():
        row = [name, str(found.boxes), number(found.ap)]
        if champion is not None:
            old = champion.per_class.get(name)
            row.append(number(None if old is None else old.ap))
        rows.append(row)
    return Section("Classes", "AP is the mean over IoU 0.50 to 0.95.", header, rows)


def _slices(scores: Scores, verdict: Verdict | None) -> Section:
    at = "at the operating point" if scores.operating_point else "at the threshold of the best F1"
    text = (
        f"F1 is the best over all thresholds; false alarms are wrong detections per image, {at}. "
        "A slice by area counts only boxes of that area."
    )
    header = ["Slice", "Images", "Boxes", "mAP", "AP50", "F1", "False alarms per image"]
    if verdict is not None and verdict.champion is not None:
        header.append("Change against the champion (95 %)")
    rows = []
    for name, found in scores.slices.items():
        row = [name, str(found.images), str(found.boxes), *_slice_numbers(found)]
        if verdict is not None and verdict.champion is not None:
            change = verdict.slices.get(name)
            ends = change and f"[{change.lower:+.4f}, {change.upper:+.4f}]"
            row.append("" if change is None else f"{change.change:+.4f} {ends}")
        rows.append(row)
    return Section("Slices", text, header, rows)


def _slice_numbers(found: Slice) -> list[str]:
    values = (found.map_50_95, found.map_50, found.f1, found.false_alarms)
    return [number(value) for value in values]


def _operating_point(point: AtPoint, tested: Collection[str]) -> Section:
    text = (
        f"Target {point.target}, chosen on {point.chosen_on}. Here: F1 {point.f1:.4f}, precision "
        f"{point.precision:.4f}, recall {point.recall:.4f}, {point.false_alarms:.4f} false alarms "
        f"per image, {point.detections} detections. Classes with few boxes share a threshold."
    )
    if point.note:
        text += f" {point.note[0].upper()}{point.note[1:]}."
    header = ("Class", "Threshold", "Shared", "Target reached", "Precision", "Recall")
    words = {True: "yes", False: "no"}
    rows = [
        [
            name,
            number(row.threshold),
            words[row.shared],
            words[row.reached],
            number(row.precision),
            number(row.recall if name in tested else None),
        ]
        for name, row in point.classes.items()
    ]
    return Section("Operating point", text, header, rows)


def _error_types(found: ErrorTypes, champion: ErrorTypes | None) -> Section:
    text = (
        f"What AP50 of the boxes ({found.ap50:.4f}) would gain if all errors of a type were "
        "corrected. Localisation: right class, IoU 0.1 to 0.5. Both: wrong class and badly placed. "
        "Background: no object there. The gains do not add up."
    )
    header = ["Error", "Number", "Costs AP50"]
    header += ["Number, champion", "Costs AP50, champion"] if champion else []
    rows = []
    for name, cost in found.costs.items():
        row = [name, str(found.counts[name]), number(cost)]
        if champion is not None:
            row += [str(champion.counts[name]), number(champion.costs[name])]
        rows.append(row)
    models = [found] + ([champion] if champion else [])
    bars = Bars(
        "AP50 that correcting the errors of a type would add",
        ("model", "champion")[: len(models)],
        [(name, [max(0.0, model.costs[name]) for model in models]) for name in found.costs],
    )
    return Section("Types of errors", text, header, rows, bars=bars)


def _suspects(scores: Scores, images: Path | None) -> Section:
    text = (
        f"{scores.suspected_labels or 0} labels of this split are strongly suspected (0.5 or more) "
        "to be wrong, because the model is sure of something else. The most suspicious ones are "
        "shown: green is the label, red what the model sees. The command rfdetr-pipeline labels "
        "shows more and writes corrections."
    )
    rows, pictures = [], []
    shown = crops(scores.suspects, images) if images else ((s, "") for s in scores.suspects)
    for suspect, url in shown:
        kind, seen = suspect.kind.replace("_", " "), suspect.proposal or "nothing"
        label = suspect.label or "none"
        rows.append([kind, f"{suspect.suspicion:.2f}", label, seen, suspect.image])
        if url:
            change = f"{kind} {suspect.suspicion:.2f}: {label} \N{RIGHTWARDS ARROW} {seen}"
            pictures.append((url, f"{change}, {suspect.image}"))
    header = ("Kind", "Suspicion", "Label", "Model sees", "Image")
    return Section("Suspected labels", text, header, rows, pictures=pictures)


def _calibration(found: Calibration) -> Section:
    text = (
        f"Expected calibration error {found.ece:.4f}: the mean difference between score and the "
        f"share of right detections, from score {LOWEST_SCORE} on. On the diagonal, a score is a "
        "probability."
    )
    rows = [
        [
            f"{row.low:.1f} to {row.high:.1f}",
            str(row.detections),
            number(row.score),
            number(row.precision),
        ]
        for row in found.bins
    ]
    header = ("Score", "Detections", "Mean score", "Right")
    curve = [(row.score, row.precision) for row in found.bins]
    return Section("Calibration", text, header, rows, curve)


def number(value: float | None) -> str:
    """A number with four decimals, or nothing."""
    return "" if value is None else f"{value:.4f}"


def to_markdown(heading: str, intro: str, found: Sequence[Section]) -> str:
    """The report in Markdown; every value is escaped."""
    lines = [f"# {markdown_text(heading)}", "", markdown_text(intro)]
    for section in found:
        lines += ["", f"## {section.title}", ""]
        lines += [markdown_text(section.text), ""] if section.text else []
        lines.append("| " + " | ".join(section.header) + " |")
        lines.append("|---" + "|---:" * (len(section.header) - 1) + "|")
        lines += ["| " + " | ".join(map(markdown_text, row)) + " |" for row in section.rows]
    return "\n".join(lines) + "\n"


def to_html(heading: str, intro: str, found: Sequence[Section]) -> str:
    """The report as one HTML document without external resources."""
    loaders = [jinja2.PackageLoader("flows.gate"), jinja2.PackageLoader("rfdetr.checks")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    template = environment.get_template("evaluation.html.j2")
    text = template.render(heading=heading, intro=intro, sections=found)
    return text.encode("utf-8", "replace").decode("utf-8")
