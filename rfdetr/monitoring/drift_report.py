"""The result of comparing image profiles, as computed by `rfdetr.monitoring.drift`."""

from __future__ import annotations

from pydantic import BaseModel

COLUMNS = (
    "value: how far the recent images are from the reference, 0 if they are alike (embedding: "
    "energy distance up to 1; others: population stability index). "
    "chance: the value that images of the same kind stay below in 999 of 1000 cases. threshold: an "
    "alarm needs a value above both chance and threshold. reference, recent: the means."
)


class Measure(BaseModel, frozen=True):
    """One comparison.

    `value` is the relative energy distance of embeddings (0 equal, 1 apart) or the population
    stability index of a histogram, minus its mean over shuffled images. `noise` is the level that
    999 of 1000 shuffles stay below. Without a `threshold` the measure never alarms. `reference`
    and `recent` are mean values to display, None where there is no mean.
    """

    name: str
    value: float
    noise: float
    threshold: float | None
    drifted: bool
    reference: float | None = None
    recent: float | None = None


class DriftReport(BaseModel, frozen=True):
    """All measures, and the recent images least like the reference, the farthest first."""

    drifted: bool
    measures: tuple[Measure, ...]
    reference_images: int
    recent_images: int
    unreadable: tuple[str, ...] = ()
    unusual: tuple[str, ...] = ()

    @property
    def alarms(self) -> list[str]:
        """Names of the measures that alarm."""
        return [measure.name for measure in self.measures if measure.drifted]

    def to_markdown(self) -> str:
        """A summary sentence and a table."""
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
        lines += ["", COLUMNS]
        if self.unreadable:
            lines += ["", f"{len(self.unreadable)} files could not be read."]
        if self.unusual:
            lines += ["", "Least like the reference: " + ", ".join(self.unusual)]
        return "\n".join(lines) + "\n"
