"""What a comparison of image profiles came to; `rfdetr.monitoring.drift` makes it."""

from __future__ import annotations

from pydantic import BaseModel


class Measure(BaseModel, frozen=True):
    """One comparison. `reference` and `recent` are means, for a person; None where none exists.

    `value` is the relative energy distance of embeddings (0 equal, 1 apart), or the population
    stability index of a histogram, each less its mean under chance. `noise` is what chance stays
    below in 999 of 1000 cases. Without a `threshold` the measure never alarms.
    """

    name: str
    value: float
    noise: float
    threshold: float | None
    drifted: bool
    reference: float | None = None
    recent: float | None = None


class DriftReport(BaseModel, frozen=True):
    """All measures, and the recent images that are least like the reference, farthest first."""

    drifted: bool
    measures: tuple[Measure, ...]
    reference_images: int
    recent_images: int
    unreadable: tuple[str, ...] = ()
    unusual: tuple[str, ...] = ()

    @property
    def alarms(self) -> list[str]:
        """Names of the measures that are past their threshold."""
        return [measure.name for measure in self.measures if measure.drifted]

    def to_markdown(self) -> str:
        """A sentence and a table, for a person."""
        verdict = f"Drift: {', '.join(self.alarms)}." if self.drifted else "No drift."
        lines = [
            f"**{verdict}** {self.recent_images} recent images against {self.reference_images} "
            "of the reference.",
            "",
            "| measure | value | chance | threshold | reference | recent | |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for m in self.measures:
            numbers = (m.value, m.noise, m.threshold, m.reference, m.recent)
            shown = " | ".join("-" if n is None else f"{n:.3f}" for n in numbers)
            lines.append(f"| {m.name} | {shown} | {'**drift**' if m.drifted else ''} |")
        if self.unreadable:
            lines += ["", f"{len(self.unreadable)} files could not be read."]
        if self.unusual:
            lines += ["", "Least like the reference: " + ", ".join(self.unusual)]
        return "\n".join(lines) + "\n"
