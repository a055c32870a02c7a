"""The targets of a batch as one tensor per key, seen as one dictionary per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

Target = dict[str, Any]


class Column(NamedTuple):
    """The values of one key: flat, one image after the other, and the shape of each image's."""

    flat: Tensor  # (sum of the products of the shapes,)
    shapes: list[tuple[int, ...] | None]  # per image; None where the image lacks the key

    def views(self) -> list[Tensor | None]:
        """The value of every image, a view of `flat`."""
        sizes = [0 if shape is None else torch.Size(shape).numel() for shape in self.shapes]
        parts = torch.split(self.flat, sizes)
        return [
            None if shape is None else part.view(shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]


class PackedTargets(list[Target]):
    """One dictionary per image, whose tensors are views of one flat tensor per key.

    A loader's worker passes each flat tensor in one block of shared memory, and each is moved to
    a device in one copy; a tensor of its own for every value would take a file descriptor and a
    copy each. The dictionaries may be changed: what changed is packed again before it moves.
    `PackedTargets(targets)` packs a sequence of dictionaries, as Lightning makes a list of this
    type from converted elements.
    """

    def __init__(self, targets: Iterable[Target] = ()) -> None:
        super().__init__()
        self._fill(*_columns(list(targets)))

    @classmethod
    def of_columns(cls, columns: dict[str, Column], others: Sequence[Target]) -> Self:
        """Targets of tensors that are packed already, and of the other values of each image."""
        made = cls.__new__(cls)
        made._fill(columns, others)
        return made

    def _fill(self, columns: dict[str, Column], others: Sequence[Target]) -> None:
        self[:] = [dict(other) for other in others]
        self._columns = columns
        self._others = others
        for name, column in columns.items():
            for target, view in zip(self, column.views(), strict=True):
                if view is not None:
                    target[name] = view
        self._packed = [dict(target) for target in self]

    def pin_memory(self) -> Self:
        """The same targets in page-locked host memory."""
        return self.map(lambda tensor: tensor.pin_memory())

    def map(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same targets with `move` applied to every tensor, once per key."""
        now = self._current()
        moved = {name: Column(move(c.flat), c.shapes) for name, c in now._columns.items()}
        others = [
            {k: move(v) if isinstance(v, Tensor) else v for k, v in other.items()}
            for other in now._others
        ]
        return self.of_columns(moved, others)

    def _current(self) -> Self:
        """These targets, packed again if a dictionary was changed."""
        unchanged = len(self) == len(self._packed) and all(
            target.keys() == packed.keys() and all(target[name] is packed[name] for name in packed)
            for target, packed in zip(self, self._packed, strict=True)
        )
        return self if unchanged else type(self)(self)

    def __reduce__(self) -> tuple[Any, ...]:
        now = self._current()
        return self.of_columns, (now._columns, now._others)


def _columns(targets: Sequence[Target]) -> tuple[dict[str, Column], list[Target]]:
    """The tensors of each key that have one type and are on one device, and all other values."""
    columns: dict[str, Column] = {}
    for name in {name: None for target in targets for name in target}:
        values = [target.get(name) for target in targets]
        tensors = [value for value in values if isinstance(value, Tensor)]
        kinds = {(value.dtype, value.device, value.layout) for value in tensors}
        given = sum(name in target for target in targets)
        if len(tensors) == given and len(kinds) == 1 and tensors[0].layout is torch.strided:
            shapes = [tuple(v.shape) if isinstance(v, Tensor) else None for v in values]
            flat = torch.cat([value.detach().reshape(-1) for value in tensors])
            columns[name] = Column(flat, shapes)
    return columns, [{k: v for k, v in target.items() if k not in columns} for target in targets]
