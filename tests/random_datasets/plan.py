"""A strategy of random datasets: a layout, a task, and up to four defects in random places."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

from tests.random_datasets.base import Case, Kind, clean
from tests.random_datasets.coco import COCO_DEFECTS
from tests.random_datasets.images import IMAGE_DEFECTS
from tests.random_datasets.yolo import YOLO_DEFECTS

DEFECTS = {
    "roboflow": IMAGE_DEFECTS | COCO_DEFECTS,
    "coco": IMAGE_DEFECTS | COCO_DEFECTS,
    "yolo": IMAGE_DEFECTS | YOLO_DEFECTS,
}


class Damage(NamedTuple):
    """A defect and its place."""

    name: str
    split: str
    number: int


class Plan(NamedTuple):
    """Everything that a random dataset consists of."""

    kind: Kind
    masks: bool
    damages: tuple[Damage, ...]

    def build(self, root: Path) -> Case:
        """Write the dataset. Defects that do not fit together leave each other out."""
        case = clean(root, self.kind)
        for name, split, number in self.damages:
            chosen = split if split in case.splits else "val"
            try:
                DEFECTS[self.kind][name](case, chosen, number)
            except (KeyError, IndexError, AttributeError, TypeError, OSError, ZeroDivisionError):
                continue
        case.write()
        return case


def _plans(kind: Kind) -> st.SearchStrategy[Plan]:
    damage = st.builds(
        Damage,
        st.sampled_from(sorted(DEFECTS[kind])),
        st.sampled_from(["train", "train", "train", "val", "test"]),
        st.integers(0, 7),
    )
    return st.builds(
        Plan, st.just(kind), st.booleans(), st.lists(damage, min_size=0, max_size=4).map(tuple)
    )


plans = st.sampled_from(("roboflow", "coco", "yolo")).flatmap(_plans)
