"""What a repair did, and whether its copy may be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rfdetr.checks.repair.counts import SplitCounts

MOST_DROPPED = 0.05  # share of the images or annotations of a split


@dataclass(frozen=True)
class RepairResult:
    """What was repaired, and the counts per split before and after.

    `restored` counts corrections by what was done, `repaired` findings that are gone and `left`
    those that remain, by code. `actions` has one line per repair. `refusal` says why the copy must
    not be used, None if it may.
    """

    folder: Path | None
    before: dict[str, SplitCounts]
    after: dict[str, SplitCounts]
    restored: dict[str, int]
    repaired: dict[str, int]
    left: dict[str, int]
    actions: tuple[str, ...]
    broken_links: tuple[str, ...]
    refusal: str | None

    @property
    def better(self) -> bool:
        """Whether the copy has fewer errors or warnings, or there was nothing to repair."""
        before, after = (
            (sum(c.errors for c in counts.values()), sum(c.warnings for c in counts.values()))
            for counts in (self.before, self.after)
        )
        return after < before or before == (0, 0)

    def text(self) -> str:
        """A summary for the terminal."""
        lines = [f"repaired copy: {self.folder}", *self._table()]
        lines += [f"  restored {count:6,} {what}" for what, count in self.restored.items()]
        lines += [f"  repaired {count:6,} {code}" for code, count in self.repaired.items()]
        lines += [f"  left     {count:6,} {code}" for code, count in self.left.items()]
        lines += [f"  left out {link}: the link leads nowhere" for link in self.broken_links]
        if not self.better:
            lines.append("The copy is not better than the dataset: what is left needs a decision.")
        return "\n".join(lines)

    def plan(self) -> str:
        """One line per repair, then what is left to the user."""
        lines = [*self.actions, *(f"{what}: {n} x" for what, n in self.restored.items())]
        lines += [f"by hand: {count} x {code}" for code, count in self.left.items()]
        if self.refusal:
            lines.append(f"--fix would refuse: {self.refusal}")
        return "\n".join(lines) or "nothing to repair"

    def _table(self) -> list[str]:
        head = f"  {'':8}{'images':>18}{'trainable objects':>22}{'errors':>16}{'warnings':>16}"
        rows = [head]
        for name in dict.fromkeys([*self.before, *self.after]):
            old, new = self.before.get(name, SplitCounts()), self.after.get(name, SplitCounts())
            rows.append(
                f"  {name or 'general':8}{_change(old.images, new.images, 18)}"
                f"{_change(old.objects, new.objects, 22)}{_change(old.errors, new.errors, 16)}"
                f"{_change(old.warnings, new.warnings, 16)}"
            )
        return rows


def _change(old: int, new: int, width: int) -> str:
    return f"{old:,} -> {new:,}".rjust(width)


def refusal(
    before: dict[str, SplitCounts], after: dict[str, SplitCounts], allow_drop: bool
) -> str | None:
    """Why a copy with these counts must not be used."""
    for name, old in before.items():
        new = after.get(name, SplitCounts())
        if old.images and not new.images:
            return f"{name} would have no image left. Correct the dataset first."
        if allow_drop:
            continue
        for what, listed, left in (
            ("images", old.images, new.images),
            ("annotations", old.annotations, new.annotations),
        ):
            if listed - left > MOST_DROPPED * listed:
                return (
                    f"{listed - left} of the {listed} {what} of {name} cannot be saved, more than "
                    f"{MOST_DROPPED:.0%}. `--fix-plan` lists them; `--allow-drop` drops them."
                )
        if new.objects < old.objects:
            return f"{name} would lose {old.objects - new.objects} objects that training uses."
    errors = [sum(counts.errors for counts in found.values()) for found in (before, after)]
    return None if errors[1] <= errors[0] else f"{errors[0]} errors would become {errors[1]}."
