"""The slow reading of a COCO file: entry by entry, with what is wrong with each."""

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
    AnnotationRow,
    ProblemCode,
    Raw,
    SegmentationText,
    value_code,
)

UNKNOWN = -(2**63)  # an id, width or height that the file does not give
MAX_PROBLEMS = 10_000  # of one section; the rest is counted
SECTIONS = ("images", "annotations", "categories")

FAILURES = (ValueError, RecursionError)  # msgspec's errors and UnicodeDecodeError are ValueErrors


@dataclass(frozen=True)
class Problem:
    """Something wrong in an annotation file. A `fatal` one keeps its entry out of the tables."""

    code: ProblemCode
    section: str  # "file", "images", "annotations" or "categories"
    row: int | None
    key: str | None
    value: str
    reason: str
    fatal: bool = True
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


class Rows(NamedTuple):
    """Entries of one section that could be read, and their positions in the file's list."""

    entries: list[Any]
    numbers: Sequence[int]


def byte_offset(raw: msgspec.Raw, data: bytes) -> int:
    """Where the bytes of `raw` begin in the buffer that it was decoded from."""
    here = np.frombuffer(raw, np.uint8).ctypes.data
    return int(here - np.frombuffer(data, np.uint8).ctypes.data)


_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*+"|-?Infinity|NaN', re.DOTALL)


def quote_constants(data: bytes) -> bytes:
    """NaN and Infinity, which Python writes and JSON forbids, as texts of the same length."""

    def quoted(match: re.Match[bytes]) -> bytes:
        token = match.group()
        return token if token.startswith(b'"') else b'"' + token[:-2] + b'"'

    return _TOKENS.sub(quoted, data)


def outline(data: bytes) -> tuple[dict[str, msgspec.Raw], bytes, list[Problem]]:
    """The top-level values as text, the buffer that they lie in, and what is wrong."""
    try:
        return _top_level(data), data, []
    except msgspec.ValidationError:
        reason = "the top level is not an object {}"
        return {}, data, [Problem("json-structure", "file", None, None, "", reason)]
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text: {error.reason}"
    except RecursionError:
        reason = "lists are nested too deeply"
    except msgspec.DecodeError as error:
        return _outline_of_python_json(data, str(error))
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
        "json-malformed", "file", None, None, repr(near), reason, line=Lines(data).at(offset)
    )


class Lines:
    """Line numbers, from 1, of bytes; cheap when asked in ascending order."""

    def __init__(self, data: bytes) -> None:
        self._data, self._offset, self._line = data, 0, 1

    def at(self, offset: int) -> int:
        """The line that holds the byte."""
        if offset < self._offset:
            self._offset, self._line = 0, 1
        self._line += self._data.count(b"\n", self._offset, offset)
        self._offset = offset
        return self._line


def read_rows(data: bytes) -> tuple[dict[str, Rows], bytes, list[Problem]]:
    """Every entry that can be read, the text that it was read from, and what is wrong with others.

    The text has the length of `data`; constants that JSON forbids are quoted in it.
    """
    values, text, problems = outline(data)
    sections = {name: Rows([], []) for name in SECTIONS}
    if problems:
        return sections, text, problems
    for name in SECTIONS:
        raws, wrong = section_rows(values, name)
        problems += wrong
        sections[name], wrong = _check_section(name, raws, data, text)
        problems += wrong
    return sections, text, problems


def section_rows(
    values: dict[str, msgspec.Raw], name: str
) -> tuple[list[msgspec.Raw], list[Problem]]:
    """The entries of one section as text."""
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
) -> tuple[Rows, list[Problem]]:
    kind = KINDS[name]
    decoder = msgspec.json.Decoder(kind)
    lines = Lines(data)
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
    return Rows(entries, numbers), problems


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
    """One entry that the typed decoder refused: as Python reads it, or what is wrong with it."""
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
            except (ValueError, TypeError, OverflowError):
                code, reason = value_code(key, value, rule), f"is not {rule.expected}"
                problems.append(place.problem(code, key, _short(value), reason, own_id))
        elif rule.required:
            reason = "is null" if key in entry else "the key is missing"
            problems.append(place.problem("key-missing", key, "", reason, own_id))
    if problems:
        return None, problems
    if kind is AnnotationRow:
        values["segmentation"] = msgspec.json.decode(raw, type=SegmentationText).segmentation
    return kind(**values), []


def _short(value: Any) -> str:
    shown = value.decode("utf-8", "replace") if isinstance(value, bytes) else repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
