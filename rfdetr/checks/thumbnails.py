"""Thumbnails of the worst findings, with their boxes drawn, as data URLs."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageOps

from rfdetr.checks.dataset_report import DatasetReport, Finding
from rfdetr.checks.image_probe import probe_bytes
from rfdetr.data.decode import open_image, to_rgb

SIDE = 240
LIMIT = 24
PER_CODE = 4
RED = (230, 30, 40)


class Thumbnail(NamedTuple):
    """A finding and its image as a data URL."""

    finding: Finding
    url: str


def worst_findings(report: DatasetReport, dataset_dir: str | os.PathLike[str]) -> list[Thumbnail]:
    """Thumbnails of at most 24 findings whose image can be decoded, four per code."""
    folder = Path(dataset_dir).expanduser().absolute()
    shown: dict[str, int] = {}
    thumbnails: list[Thumbnail] = []
    for finding in report.findings:
        name = finding.details.get("image")
        if len(thumbnails) == LIMIT:
            break
        if not isinstance(name, str) or shown.get(finding.code, 0) >= PER_CODE:
            continue
        url = _thumbnail(folder / name, finding.details.get("box"))
        if url is not None:
            shown[finding.code] = shown.get(finding.code, 0) + 1
            thumbnails.append(Thumbnail(finding, url))
    return thumbnails


def _thumbnail(path: Path, box: object) -> str | None:
    try:
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    if probe_bytes(data).status != "ok":
        return None
    with open_image(data) as image:
        rgb = to_rgb(image).copy()
    scale = min(1.0, SIDE / max(rgb.size))
    small = rgb.resize([max(1, round(side * scale)) for side in rgb.size])
    small = ImageOps.expand(small, 8, (245, 245, 245))
    if isinstance(box, Sequence) and len(box) == 4:
        _draw(small, [float(value) * scale + (8 if i < 2 else 0) for i, value in enumerate(box)])
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _draw(image: Image.Image, box: Sequence[float]) -> None:
    """Draw x, y, w, h; boxes beyond the image are drawn on its margin."""
    x, y, w, h = box
    limits = [(0, image.width - 1), (0, image.height - 1)] * 2
    corners = (min(x, x + w), min(y, y + h), max(x, x + w), max(y, y + h))
    inside = [
        min(max(value, low), high) if value == value else 0  # noqa: PLR0124 - NaN differs from itself
        for value, (low, high) in zip(corners, limits, strict=True)
    ]
    ImageDraw.Draw(image).rectangle(inside, outline=RED, width=2)
