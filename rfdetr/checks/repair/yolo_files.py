"""Repairs of YOLO label files and image lists."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rfdetr.checks.dataset_report import Finding
from rfdetr.data.yolo import label_path
from rfdetr.files import write_text_atomic

CLIPS = frozenset({"clip-box", "clip-polygon"})


def repair_label_file(source: Path, target: Path, findings: Sequence[Finding]) -> None:
    """Write a label file without dropped lines and with clipped boxes and polygons."""
    text = source.read_bytes().decode("utf-8-sig", "replace")
    dropped = {f.line for f in findings if f.repair.startswith("drop")}
    clipped = {f.line for f in findings if f.repair in CLIPS}
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if number in dropped:
            continue
        lines.append(clip_line(line) if number in clipped else line)
    target.unlink()  # it may be a hard link to the source
    write_text_atomic(target, "".join(line + "\n" for line in lines))


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
    return " ".join([label, *(f"{value:.6f}".rstrip("0").rstrip(".") for value in values)])


def detach_yaml(yaml_file: Path, source: Path) -> None:
    """Make a copied data.yaml point to its own folder where it pointed into the source."""
    text = yaml_file.read_bytes().decode("utf-8-sig", "replace")
    own = re.sub(r"^path[ \t]*:.*$", "path: .", text, flags=re.MULTILINE)
    own = own.replace(f"{source}{os.sep}", "")
    if own != text:
        yaml_file.unlink()  # it may be a hard link to the source
        write_text_atomic(yaml_file, own)


def repair_list_file(
    source: Path, listing: Path, gone: Collection[str], names: Mapping[str, str]
) -> None:
    """Rewrite a list of images without those left out and with the new names."""
    lines = []
    for line in listing.read_bytes().decode("utf-8-sig", "replace").splitlines():
        path = Path(os.path.normpath(source / line.strip()))
        if not line.strip() or source not in path.parents or label_path(path) == path:
            lines.append(line)
            continue
        key = path.relative_to(source).as_posix()
        if key not in gone:
            lines.append(names.get(key, line.strip()))
    listing.unlink()  # it may be a hard link to the source
    write_text_atomic(listing, "".join(line + "\n" for line in lines))
