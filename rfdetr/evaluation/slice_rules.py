"""How slices of a test set are described: by path, list file, image attribute or box area.

| text                    | slices                                                            |
|-------------------------|-------------------------------------------------------------------|
| `path:(?P<site>[^/]+)/` | one per value of the group, of images whose path matches          |
| `path:night`            | one: the images whose path matches                                |
| `file:night.txt`        | one: the images listed, one path per line                         |
| `attribute:weather`     | one per value of the key of the COCO image entry; `a.b` is nested |
| `area<32**2`            | one: the boxes of that area, others are ignored as COCO does      |

A path is relative to the images folder of the split.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rfdetr.data.text import split_lines
from rfdetr.errors import InputError

Kind = Literal["path", "file", "attribute", "area"]
LARGEST_AREA = 1e10  # pixels; the upper end of COCO's area range "all"
LARGEST_EXPONENT = 8
EXAMPLES = (
    "write path:REGEX, file:LIST.txt, attribute:KEY, or a comparison of the area such as area<32**2"
)


@dataclass(frozen=True)
class SliceRule:
    """One entry of `slices`. `value` is what follows the kind.

    `pattern` belongs to the kind path, `area`, the lowest and the highest area in pixels,
    inclusive, to area, and `listed`, the paths in the list file once it was read, to file.
    """

    name: str
    kind: Kind
    value: str
    pattern: re.Pattern[str] | None = None
    area: tuple[float, float] | None = None
    listed: frozenset[str] = frozenset()


def parse_rule(name: str, text: Any) -> SliceRule:
    """Parse one entry of `slices`. Raises InputError that says what is wrong; never evaluates."""
    if not isinstance(text, str):
        raise InputError(f"must be text; {EXAMPLES}")
    kind, colon, value = text.partition(":")
    if kind == "path" and colon:
        return SliceRule(name, "path", value, pattern=_pattern(value))
    if kind in ("file", "attribute") and colon:
        if not value.strip():
            raise InputError(f"'{kind}:' needs a {'file' if kind == 'file' else 'key'} behind it")
        return SliceRule(name, "file" if kind == "file" else "attribute", value.strip())
    if re.search(r"\barea\b", text):
        return SliceRule(name, "area", text, area=parse_area(text))
    raise InputError(EXAMPLES)


def read_listed(text: str, dataset: Path | None = None) -> frozenset[str]:
    """The paths of a list file; empty lines and those that begin with # do not count.

    Absolute paths become relative to the folder `dataset`.
    """
    lines = (line.strip() for line in split_lines(text))
    paths = (line.replace("\\", "/").removeprefix("./") for line in lines if line)
    roots = [] if dataset is None else [dataset.absolute(), dataset.resolve()]
    found = set()
    for path in paths:
        for root in roots:
            path = path.removeprefix(f"{root.as_posix()}/")  # noqa: PLW2901
        if path[0] != "#":
            found.add(path)
    return frozenset(found)


def _pattern(value: str) -> re.Pattern[str]:
    if not value:
        raise InputError("'path:' needs a regular expression behind it")
    try:
        pattern = re.compile(value)
    except re.error as error:
        place = "" if error.pos is None else f" at position {error.pos}"
        raise InputError(f"{value!r} is not a regular expression: {error.msg}{place}") from None
    if pattern.groups > 1:
        raise InputError(
            f"{value!r} has {pattern.groups} groups; one group names the slices. Write (?:...) "
            "around what is only grouped"
        )
    return pattern


def parse_area(text: str) -> tuple[float, float]:
    """The lowest and highest area, inclusive, of comparisons such as `32**2 <= area < 96**2`."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise InputError(f"{text!r} is not a comparison such as area<32**2") from None
    low, high = 0.0, LARGEST_AREA
    both = isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And)
    for part in tree.values if both else [tree]:  # type: ignore[attr-defined]
        if not isinstance(part, ast.Compare):
            raise InputError(f"{text!r} is not a comparison such as area<32**2")
        for left, op, right in zip(
            [part.left, *part.comparators], part.ops, part.comparators, strict=False
        ):
            below, above = _bounds(left, op, right, text)
            low, high = max(low, below), min(high, above)
    if low > high:
        raise InputError(f"{text!r} holds for no area")
    return low, high


def _bounds(left: ast.expr, op: ast.cmpop, right: ast.expr, text: str) -> tuple[float, float]:
    """The lowest and highest area that one comparison allows."""
    names = (isinstance(left, ast.Name), isinstance(right, ast.Name))
    for side in (left, right):
        if isinstance(side, ast.Name) and side.id != "area":
            raise InputError(f"{text!r}: {side.id} is unknown; only area can be compared")
    known = type(op) in (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
    if names.count(True) != 1 or not known:
        raise InputError(f"{text!r}: compare area with a number by <, <=, > or >=")
    limit = _number(right if names[0] else left, text)
    upper = isinstance(op, ast.Lt | ast.LtE) == names[0]
    if isinstance(op, ast.Lt | ast.Gt):
        limit = math.nextafter(limit, -math.inf if upper else math.inf)
    return (0.0, limit) if upper else (limit, LARGEST_AREA)


def _number(node: ast.expr, text: str) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = float(str(node.value))
    elif isinstance(node, ast.BinOp):
        value = _computed(node, text)
    else:
        raise InputError(f"{text!r}: only numbers and + - * / ** are allowed beside area")
    if not 0 <= value <= LARGEST_AREA:
        raise InputError(f"{text!r}: an area lies between 0 and {LARGEST_AREA:g} pixels")
    return value


def _computed(node: ast.BinOp, text: str) -> float:
    left, right = _number(node.left, text), _number(node.right, text)
    if isinstance(node.op, ast.Pow) and right <= LARGEST_EXPONENT:
        return float(left**right)
    if isinstance(node.op, ast.Div) and right:
        return left / right
    if isinstance(node.op, ast.Mult):
        return left * right
    if isinstance(node.op, ast.Add | ast.Sub):
        return left + right if isinstance(node.op, ast.Add) else left - right
    raise InputError(f"{text!r}: only numbers and + - * / ** are allowed beside area")


def text_values(value: Any) -> Collection[str]:
    """The values of an attribute as text: none, one, or those of a list."""
    if isinstance(value, list):
        return [text for item in value for text in text_values(item)]
    if isinstance(value, bool):
        return [str(value).lower()]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = " ".join(str(value).split())
    return [text] if isinstance(value, str | int | float) and text else []
