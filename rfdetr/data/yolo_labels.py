"""Lines of YOLO label files.

Format: https://docs.ultralytics.com/datasets/detect and .../segment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rfdetr.data.text import read_text, split_lines
from rfdetr.errors import DatasetError


class LabelRow(NamedTuple):
    """One line: class, box x0 y0 x1 y1, polygon x y x y ... (empty for a box), as fractions."""

    label: int
    box: tuple[float, float, float, float]
    polygon: list[float]
    line: int


POSE_HINT = "pose labels need kpt_shape: [keypoints, 2 or 3] in data.yaml"
# What is wrong with a line; the dataset checks report findings under the same codes.
LineCode = Literal["label-line-malformed", "label-class-range", "box-non-numeric", "box-nan"]


class LabelProblem(NamedTuple):
    """An invalid line."""

    line: int
    text: str
    reason: str
    code: LineCode = "label-line-malformed"

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason} (found {self.text!r})"


def read_labels(
    path: Path, classes: int, keypoint_values: int = 0
) -> tuple[list[LabelRow], list[LabelProblem]]:
    """The valid lines of a label file and the problems of the others; a missing file is empty.

    `keypoint_values` are the numbers that follow the box in pose labels; they are not used.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        return [], []
    except UnicodeError as error:
        return [], [LabelProblem(1, "", f"the file is {error}")]
    except OSError as error:
        return [], [LabelProblem(1, "", f"the file cannot be read: {error.strerror or error}")]
    rows, problems = [], []
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            try:
                rows.append(parse_line(line, classes, number, keypoint_values))
            except LineError as error:
                problem = LabelProblem(number, line.strip()[:80], str(error), error.code)
                problems.append(problem)
    return rows, problems


class LineError(DatasetError):
    """An invalid label line, with the reason."""

    def __init__(self, reason: str, code: LineCode = "label-line-malformed") -> None:
        super().__init__(reason)
        self.code = code


def parse_line(line: str, classes: int, number: int = 1, keypoint_values: int = 0) -> LabelRow:
    """Parse one label line, as `read_labels`. Raises LineError with the reason."""
    words = line.split()
    if keypoint_values:
        if len(words) not in (5, 5 + keypoint_values):
            raise LineError(
                f"{len(words)} numbers; with kpt_shape: in data.yaml a line has 5, or "
                f"{5 + keypoint_values} with keypoints"
            )
        _floats(words[5:])
        words = words[:5]
    elif len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise LineError(
            f"{len(words)} numbers; expected 5, or an odd count of at least 7{_hint(line)}"
        )
    label = _class_number(words[0])
    if not 0 <= label < classes:
        raise LineError(f"the class {label} is not in 0..{classes - 1}", "label-class-range")
    values = _floats(words[1:])
    if len(values) > 4 and (len(values) - 4) % 3 == 0:
        visibility = set(values[6::3])
        if 2.0 in visibility and visibility <= {0.0, 1.0, 2.0}:
            raise LineError(f"the line has a box and keypoints with visibility; {POSE_HINT}")
    if len(values) == 4:
        cx, cy, w, h = values
        return LabelRow(label, (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), [], number)
    xs, ys = values[::2], values[1::2]
    return LabelRow(label, (min(xs), min(ys), max(xs), max(ys)), values, number)


def _hint(line: str) -> str:
    """What a line of the wrong length may be."""
    words = line.split()
    if len(words) == 6:
        return " (a confidence behind the box? Ultralytics writes it with save_conf=True)"
    if len(words) in (9, 10) and not words[8].replace(".", "").isdigit():
        return " (DOTA labels? Export them as YOLO OBB: the class first, corners in fractions)"
    for mark, name in ((",", "commas"), (";", "semicolons")):
        if len(words) < 3 and mark in line:
            return f" (separated by {name}? Separate numbers by spaces)"
    if len(words) > 5 and (len(words) - 5) % 3 == 0:
        return f" (keypoints? {POSE_HINT})"
    return ""


def _floats(words: Sequence[str]) -> list[float]:
    try:
        values = [_number(word) for word in words]
    except ValueError:
        commas = " (decimal commas? Write points)" if any("," in word for word in words) else ""
        raise LineError(f"not all values are numbers{commas}", "box-non-numeric") from None
    if not all(map(math.isfinite, values)):
        raise LineError("not all values are finite", "box-nan")
    return values


def _class_number(word: str) -> int:
    """An integer in ASCII digits, also as 1.0 or 1.0e+00, as NumPy writes it."""
    if re.fullmatch("-?[0-9]{1,18}", word):
        return int(word)
    if re.fullmatch(r"-?[0-9]{1,18}\.[0-9]*(e[+-][0-9]{1,2})?", word):
        value = float(word)
        if value.is_integer() and abs(value) < 1e15:
            return int(value)
    raise LineError(f"the class {word!r} is not an integer")


def _number(word: str) -> float:
    """A number in ASCII without "_"; float() would accept more."""
    if "_" in word or not word.isascii():
        raise ValueError
    return float(word)
