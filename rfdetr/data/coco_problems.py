"""The slow reading of a COCO file: entry by entry, with the problems of each.

It runs when the fast reading refuses a file: it accepts what Python's JSON accepts and COCO tools
write (NaN, 7.0 as an integer, null for a missing value), and says where and what is wrong with
every other entry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np

from rfdetr.data.coco_entries import (
    FIELDS,
    KINDS,
    AnnotationEntry,
    ProblemCode,
    Raw,
    SegmentationText,
    value_code,
)
from rfdetr.data.text import is_packed, is_utf16, not_utf8

MAX_PROBLEMS = 10_000  # of one section; the rest is counted
SECTIONS = ("images", "annotations", "categories")

FAILURES = (ValueError, RecursionError)  # msgspec's errors and UnicodeDecodeError are ValueErrors


@dataclass(frozen=True)
class Problem:
    """Something wrong in an annotation file. An entry with a problem is not in the tables."""

    code: ProblemCode
    section: str  # "file", "images", "annotations" or "categories"
    row: int | None
    key: str | None
    value: str
    reason: str
    id: int | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = self.section if self.row is None else f"{self.section}[{self.row}]"
        if self.key:
            place += f".{self.key}"
        where = [f"id {self.id}"] if self.id is not None else []
        where += [f"line {self.line}"] if self.line is not None else []
        place += f" ({', '.join(where)})" if where else ""
        found = f" (found {self.value})" if self.value else ""
        return f"{place}: {self.reason}{found}"


class Section(NamedTuple):
    """The valid entries of one list of the file, their positions in it, and how many others."""

    entries: list[Any]
    numbers: Sequence[int]
    rejected: int = 0


def byte_offset(raw: msgspec.Raw, data: bytes) -> int:
    """The position of `raw` in the buffer that it was decoded from, which it points into."""
    here = np.frombuffer(raw, np.uint8).ctypes.data
    offset = int(here - np.frombuffer(data, np.uint8).ctypes.data)
    assert 0 <= offset < len(data)
    return offset


_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"|-?Infinity|NaN', re.DOTALL)


def quote_constants(data: bytes) -> bytes:
    """Put quotes around NaN and Infinity, which JSON forbids, keeping the length of the text."""

    def quoted(match: re.Match[bytes]) -> bytes:
        token = match.group()
        return token if token.startswith(b'"') else b'"' + token[:-2] + b'"'

    return _TOKENS.sub(quoted, data)


def outline(data: bytes) -> tuple[dict[str, msgspec.Raw], bytes, list[Problem]]:
    """The top-level values as JSON text, the buffer that they point into, and the problems."""
    try:
        return _top_level(data), data, []
    except msgspec.ValidationError:
        reason = "the top level is not an object {}"
        if data.lstrip().startswith(b"["):
            reason += "; a list holds detections (COCO results) or annotations without their images"
        return {}, data, [Problem("json-structure", "file", None, None, "", reason)]
    except UnicodeDecodeError:
        reason = not_utf8(data)
    except RecursionError:
        reason = "lists are nested too deeply"
    except msgspec.DecodeError as error:
        if b"\0" not in data[:4] and not is_utf16(data) and not is_packed(data):
            return _outline_of_python_json(data, str(error))
        reason = not_utf8(data)
    return {}, data, [Problem("json-malformed", "file", None, None, "", reason)]


def _outline_of_python_json(
    data: bytes, failure: str
) -> tuple[dict[str, msgspec.Raw], bytes, list[Problem]]:
    text = quote_constants(data)
    try:
        return _top_level(text), text, []
    except FAILURES as error:
        return {}, data, [_syntax_problem(data, str(error) if text != data else failure)]


def _top_level(text: bytes) -> dict[str, msgspec.Raw]:
    return msgspec.json.decode(text, type=dict[str, Raw])


def _syntax_problem(data: bytes, message: str) -> Problem:
    found = re.search(r"\(byte (\d+)\)", message)
    offset = int(found.group(1)) if found else len(data)
    near = data[max(0, offset - 20) : offset + 20].decode("utf-8", "replace").strip()
    column = offset - (data.rfind(b"\n", 0, offset) + 1) + 1
    reason = f"{re.sub(r' *.byte .*', '', message)} at column {column}"
    return Problem(
        "json-malformed", "file", None, None, repr(near), reason, line=LineCounter(data).at(offset)
    )


class LineCounter:
    """Line numbers, from 1, of byte positions; fast in ascending order."""

    def __init__(self, data: bytes) -> None:
        self._data, self._offset, self._line = data, 0, 1

    def at(self, offset: int) -> int:
        """The line of the byte at `offset`."""
        if offset < self._offset:
            self._offset, self._line = 0, 1
        self._line += self._data.count(b"\n", self._offset, offset)
        self._offset = offset
        return self._line


def read_entries(data: bytes) -> tuple[dict[str, Section], bytes, list[Problem]]:
    """The valid entries by section, the buffer they were decoded from, and all problems.

    The buffer is `data`, or a copy of equal length with NaN and Infinity quoted.
    """
    values, text, problems = outline(data)
    sections = {name: Section([], []) for name in SECTIONS}
    if problems:
        return sections, text, problems
    for name in SECTIONS:
        raws, wrong = section_entries(values, name)
        problems += wrong
        sections[name], wrong = _check_section(name, raws, data, text)
        problems += wrong
    return sections, text, problems


def section_entries(
    values: dict[str, msgspec.Raw], name: str
) -> tuple[list[msgspec.Raw], list[Problem]]:
    """The entries of one section as JSON text."""
    if name not in values:
        keys = ", ".join(sorted(values)[:10]) or "nothing"
        reason = f"the key is missing; the file has {keys}"
        return [], [Problem("key-missing", "file", None, name, "", reason)]
    try:
        return msgspec.json.decode(values[name], type=list[Raw]), []
    except FAILURES:
        found = _short(bytes(values[name]))
        return [], [Problem("json-structure", "file", None, name, found, "is not a list")]


def _check_section(
    name: str, raws: Sequence[msgspec.Raw], data: bytes, text: bytes
) -> tuple[Section, list[Problem]]:
    kind = KINDS[name]
    decoder = msgspec.json.Decoder(kind)
    lines = LineCounter(data)
    entries: list[msgspec.Struct] = []
    numbers, left_out = [], 0
    problems: list[Problem] = []
    for number, raw in enumerate(raws):
        entry: msgspec.Struct | None
        try:
            entry = decoder.decode(raw)
        except FAILURES:
            start = byte_offset(raw, text)
            here = _Place(name, number, lines.at(start))
            original = data[start : start + len(memoryview(raw))]
            entry, found = _examine(kind, original, raw, here)
            space = MAX_PROBLEMS - len(problems)
            problems += found[:space]
            left_out += len(found[space:])
        if entry is not None:
            entries.append(entry)
            numbers.append(number)
    if left_out:
        reason = f"{left_out} further problems"
        problems.append(Problem("json-structure", name, None, None, "", reason))
    return Section(entries, numbers, len(raws) - len(entries)), problems


class _Place(NamedTuple):
    section: str
    row: int
    line: int

    def problem(
        self, code: ProblemCode, key: str | None, value: str, reason: str, own_id: Any = None
    ) -> Problem:
        known = own_id if type(own_id) is int else None
        return Problem(code, self.section, self.row, key, value, reason, id=known, line=self.line)


def _examine(
    kind: type[msgspec.Struct], text: bytes, raw: msgspec.Raw, place: _Place
) -> tuple[msgspec.Struct | None, list[Problem]]:
    """One entry that the typed decoder refused: as Python reads it, or its problems."""
    try:
        entry = json.loads(text)
    except FAILURES as error:
        reason = f"cannot be read: {error}"
        return None, [place.problem("json-structure", None, _short(text), reason)]
    if not isinstance(entry, dict):
        reason = "is not an object {}"
        return None, [place.problem("json-structure", None, _short(entry), reason)]
    problems, values = [], {}
    for key, rule in FIELDS[kind].items():
        value, own_id = entry.get(key), entry.get("id")
        if value is not None:
            try:
                values[key] = rule.convert(value)
            except (ValueError, TypeError, OverflowError) as error:
                code, reason = value_code(key, value, rule), f"is not {rule.expected}"
                if isinstance(error, OverflowError) and isinstance(value, int):
                    reason = "is an integer beyond 64 bits"
                problems.append(place.problem(code, key, _short(value), reason, own_id))
        elif rule.required:
            reason = "is null" if key in entry else "the key is missing"
            problems.append(place.problem("key-missing", key, "", reason, own_id))
    if problems:
        return None, problems
    if kind is AnnotationEntry:
        values["segmentation"] = msgspec.json.decode(raw, type=SegmentationText).segmentation
    return kind(**values), []


def _short(value: Any) -> str:
    shown = value.decode("utf-8", "replace") if isinstance(value, bytes) else repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
