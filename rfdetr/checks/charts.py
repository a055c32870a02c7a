"""Small SVG bar charts for the HTML report."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

COLOURS = ("#3566a8", "#d98324", "#4f9d69", "#8e5aa8")
WIDTH, ROW, GAP, LABEL = 640, 14, 8, 150
MAX_ROWS = 60


def bar_chart(title: str, series: Mapping[str, Mapping[str, int]]) -> str:
    """Grouped horizontal bars: series name -> label -> count, at most 60 labels."""
    labels = list(dict.fromkeys(label for values in series.values() for label in values))
    left_out = len(labels) - MAX_ROWS
    labels = labels[:MAX_ROWS]
    top = max((v for values in series.values() for v in values.values()), default=0) or 1
    parts, y = [], 40
    for i, name in enumerate(series):
        x = LABEL + i * 110
        parts.append(f'<rect x="{x}" y="22" width="10" height="10" fill="{COLOURS[i % 4]}"/>')
        parts.append(f'<text x="{x + 14}" y="31">{_text(name)}</text>')
    for label in labels:
        middle = y + len(series) * ROW / 2 + 4
        parts.append(
            f'<text x="{LABEL - 6}" y="{middle:.0f}" text-anchor="end">{_text(label)}</text>'
        )
        for i, values in enumerate(series.values()):
            parts.append(_bar(values.get(label, 0), top, y, COLOURS[i % 4]))
            y += ROW
        y += GAP
    if left_out > 0:
        parts.append(f'<text x="{LABEL}" y="{y + 10}">and {left_out} more</text>')
        y += 16
    return (
        f'<svg viewBox="0 0 {WIDTH} {y + 6}" width="{WIDTH}" role="img">'
        f'<text x="0" y="14" class="title">{_text(title, 90)}</text>{"".join(parts)}</svg>'
    )


def _bar(value: int, top: int, y: int, colour: str) -> str:
    width = (WIDTH - LABEL - 70) * value / top
    return (
        f'<rect x="{LABEL}" y="{y}" width="{width:.1f}" height="{ROW - 3}" fill="{colour}"/>'
        f'<text x="{LABEL + width + 4:.1f}" y="{y + ROW - 5}">{value:,}</text>'
    )


def _text(text: str, limit: int = 22) -> str:
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return escape(shown)
