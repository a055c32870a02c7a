"""Repairs of YOLO label files, image lists and data.yaml."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rfdetr.checks.box_format import FILLS, YOLO, BoxFormat, box_corners
from rfdetr.checks.dataset_report import Finding
from rfdetr.checks.repair.file_names import ImageFinder, Wanted
from rfdetr.checks.repair.label_places import labels_read, place_labels
from rfdetr.checks.repair.tree import is_utf8, replace_text
from rfdetr.data.data_yaml import parse_yaml
from rfdetr.data.decode import file_size
from rfdetr.data.layouts import YAML_KEYS, YAML_NAMES, Layout, yolo_splits
from rfdetr.data.text import read_text, split_lines
from rfdetr.data.yolo import image_files
from rfdetr.data.yolo_labels import LabelRow, LineError, parse_line
from rfdetr.errors import DatasetError

CLIPS = frozenset({"clip-box", "clip-polygon"})
PIXELS = 2.0  # coordinates above are pixels: fractions exceed 1 only slightly


def detach_yaml(source: Path, work: Path) -> None:
    """Make the data.yaml of the copy name the same splits as in the source.

    Paths into the source become relative; paths outside it become absolute.
    """
    name = next((name for name in YAML_NAMES if (work / name).is_file()), None)
    if name is None:
        return
    try:
        content = parse_yaml(any_text(work / name))
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError):
        return
    if not isinstance(content, dict):
        return
    wanted = {
        split: tuple(_moved(path, source, work) for path in paths.images)
        for split, paths in yolo_splits(source / name, content, [], []).items()
    }
    own = yolo_splits(work / name, content, [], [])
    same = wanted == {split: paths.images for split, paths in own.items()}
    if same and "path" not in content and is_utf8(work / name):
        return
    changed: dict[Any, Any] = {key: value for key, value in content.items() if key != "path"}
    for split, places in wanted.items():
        key = next((key for key in YAML_KEYS[split] if content.get(key)), split)
        shown = [_shown(place, work) for place in places]
        changed[key] = shown[0] if len(shown) == 1 else shown
    replace_text(work / name, yaml.safe_dump(changed, sort_keys=False, allow_unicode=True))


def _moved(path: Path, source: Path, work: Path) -> Path:
    """The place in the copy of a path of the source; other paths stay."""
    for candidate in (path, path.resolve()):
        if candidate.is_relative_to(source):
            return work / candidate.relative_to(source)
    return path


def _shown(place: Path, work: Path) -> str:
    return place.relative_to(work).as_posix() if place.is_relative_to(work) else str(place)


def any_text(file: Path) -> str:
    """The text of a file as training reads it, else in a Windows code page."""
    try:
        return read_text(file)
    except UnicodeError:
        return file.read_bytes().decode("cp1252", "replace")


def restore_lists(source: Path, work: Path, layout: Layout) -> Counter[str]:
    """Make the lists of images in the copy name the files that they mean."""
    done: Counter[str] = Counter()
    for listing in _lists(layout, work):
        folder = source / listing.parent.relative_to(work)
        lines = [line.strip() for line in split_lines(any_text(listing)) if line.strip()]
        places = [_moved(Path(os.path.normpath(folder / line)), source, work) for line in lines]
        lost = [line for line, place in zip(lines, places, strict=True) if not place.is_file()]
        claimed = {_shown(place, work) for place in places if place.is_file()}
        wanted = [Wanted(line, None) for line in lost]
        found = ImageFinder(work, claimed).find_all(".", wanted) if lost else {}
        done["found the file that a name means"] += len(found)
        new = []
        for line, given in zip(lines, places, strict=True):
            place = work / found[line] if line in found else given
            if not place.is_relative_to(work):
                new.append(str(place))
            elif line in found or Path(line).is_absolute():
                new.append(Path(os.path.relpath(place, listing.parent)).as_posix())
            else:
                new.append(line)
        if new != lines:
            replace_text(listing, "".join(line + "\n" for line in new))
    return done


def _lists(layout: Layout, work: Path) -> list[Path]:
    paths = {path for split in layout.splits.values() for path in split.images}
    return sorted(p for p in paths if p.suffix.lower() == ".txt" and p.is_relative_to(work))


def restore_labels(work: Path, layout: Layout, formats: Mapping[str, BoxFormat]) -> Counter[str]:
    """Put label files of the copy where they belong and correct their lines.

    `formats` are those in which the boxes of a split are written, if not in that of YOLO.
    """
    done: Counter[str] = Counter()
    images = listed_images(layout)
    done["found the label file of an image"] = place_labels(
        work, layout, list(images), _lists(layout, work)
    )
    labels = {i: file for i, file in labels_read(images).items() if file.is_relative_to(work)}
    texts = {image: any_text(label) for image, label in labels.items()}
    pixels = _are_pixels(texts, layout.names)
    for image, label in labels.items():
        lines = split_lines(texts[image])
        written = formats.get(images[image])
        new = [_restored_line(line, layout.names, image, written, pixels) for line in lines]
        data = label.read_bytes()
        if new != lines or data.removeprefix(codecs.BOM_UTF8) != texts[image].encode():
            replace_text(label, "".join(line + "\n" for line in new))
        done["corrected values"] += sum(a != b for a, b in zip(lines, new, strict=True))
    return +done


def _are_pixels(texts: Mapping[Path, str], names: Sequence[str]) -> bool:
    """Whether numbers above 1 can only be pixels: all fit their images, not only a corner of them.

    One that does not fit shows that they may all be percent or belong to another size.
    """
    highest = 0.0
    for image, text in texts.items():
        rows = [row for line in split_lines(text) if (row := _row(line, names)) is not None]
        large = [row for row in rows if max(_numbers(row)) > PIXELS]
        size = file_size(image) if large else None
        if large and size is None:
            return False
        for row in large:
            assert size is not None
            fractions = [value / size[i % 2] for i, value in enumerate(_numbers(row))]
            if min(fractions) < 0 or max(fractions) > 1:
                return False
            highest = max(highest, *fractions)
    return highest > FILLS


def _row(line: str, names: Sequence[str]) -> LabelRow | None:
    try:
        return parse_line(line, len(names)) if line.strip() else None
    except LineError:
        return None


def _numbers(row: LabelRow) -> list[float]:
    """The numbers behind the class as they are written."""
    if row.polygon:
        return row.polygon
    x0, y0, x1, y1 = row.box
    return [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]


def listed_images(layout: Layout) -> dict[Path, str]:
    """The images of all splits that can be read, each with the first split that has it."""
    found: dict[Path, str] = {}
    for split in layout.splits.values():
        with contextlib.suppress(DatasetError):  # which the checks report
            for image in image_files(split):
                found.setdefault(image, split.name)
    return found


def _restored_line(
    line: str, names: Sequence[str], image: Path, written: BoxFormat | None, pixels: bool
) -> str:
    """The line as it is read, if what it means is certain."""
    row = _row(line, names)
    if row is None:
        return _reread(line, names) if line.strip() else line
    values = _numbers(row)
    if written is None and pixels and max(values) > PIXELS:
        written = BoxFormat(YOLO.form, "pixels")
    size = file_size(image) if written is not None and written.unit == "pixels" else (1, 1)
    if written is None or size is None:
        return line
    if row.polygon:
        if written.unit != "pixels":
            return line
        fractions = [value / size[i % 2] for i, value in enumerate(values)]
    else:
        x0, y0, x1, y1 = box_corners(values, size, written)
        fractions = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
    return " ".join([str(row.label), *(f"{value:.6f}" for value in fractions)])


def _reread(line: str, names: Sequence[str]) -> str:
    """A line with decimal or other commas, with the name of the class, or with a confidence."""
    text = line.strip()
    for words in (text.replace(",", ".").split(), re.split(r"[\s,;]+", text)):
        if names.count(words[0]) == 1:
            words[0] = str(names.index(words[0]))
        for new in (" ".join(words), " ".join(words[:5]) if _has_confidence(words) else ""):
            if _row(new, names) is not None:
                return new
    return line


def _has_confidence(words: Sequence[str]) -> bool:
    """Whether a line is a box and a confidence, as predictions are saved."""
    return len(words) == 6 and re.fullmatch(r"[01]?\.[0-9]+|[01]", words[5]) is not None


def repair_label_file(file: Path, findings: Sequence[tuple[Finding, str]]) -> None:
    """Remove dropped lines of a label file and clip boxes and polygons."""
    dropped = {finding.line for finding, repair in findings if repair.startswith("drop")}
    clipped = {finding.line for finding, repair in findings if repair in CLIPS}
    lines = []
    for number, line in enumerate(split_lines(any_text(file)), 1):
        if number in dropped:
            continue
        lines.append(clip_line(line) if number in clipped else line)
    replace_text(file, "".join(line + "\n" for line in lines))


def clip_line(line: str) -> str:
    """A label line with its box or polygon clipped to 0..1."""
    label, *words = line.split()
    values = [float(word) for word in words]
    if len(values) == 4:
        cx, cy, w, h = values
        left, right = (min(max(v, 0.0), 1.0) for v in (cx - w / 2, cx + w / 2))
        top, bottom = (min(max(v, 0.0), 1.0) for v in (cy - h / 2, cy + h / 2))
        values = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    else:
        values = [min(max(value, 0.0), 1.0) for value in values]
    return " ".join([label, *(f"{value:.9f}".rstrip("0").rstrip(".") for value in values)])


def repair_lists(
    work: Path, layout: Layout, gone: Collection[str], names: Mapping[str, str]
) -> None:
    """Rewrite the lists of images without those left out and with the new names."""
    for listing in _lists(layout, work):
        lines = [line.strip() for line in split_lines(any_text(listing)) if line.strip()]
        new = []
        for line in lines:
            place = Path(os.path.normpath(listing.parent / line))
            key = _shown(place, work)
            if key in names:
                new.append(Path(os.path.relpath(work / names[key], listing.parent)).as_posix())
            elif key not in gone:
                new.append(line)
        if new != lines:
            replace_text(listing, "".join(line + "\n" for line in new))
