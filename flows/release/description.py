"""The description of a registered version, for people who read the registry."""

from __future__ import annotations

from typing import Any

from flows.project.project import Project


def description(project: Project, card: dict[str, Any], numbers: dict[str, Any]) -> str:
    """A version in one paragraph: what it is, what it was trained on, how good it is."""
    data, best = card["dataset"], card["best"]
    classes = card["class_names"]
    shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    tested = ", ".join(
        f"{label} {numbers[key]:.4f}"
        for key, label in (("map_50_95", "mAP"), ("map_50", "mAP50"), ("f1", "F1"))
        if key in numbers
    )
    commit = f", git {card['git_commit'][:10]}" if card.get("git_commit") else ""
    return (
        f"RF-DETR {card['variant']} at {card['resolution']} pixels, trained on {data['name']} "
        f"({len(classes)} classes: {shown}) for {card['epochs']} epochs, best epoch "
        f"{best['epoch']}, from {card['source'].get('source') or 'scratch'}. "
        f"{project.params.evaluate.split.capitalize()} split, {numbers['images']} images: {tested}"
        f", best threshold {numbers.get('best_threshold', 0.5):.2f}. "
        f"Data {data['digest'][:12]}{commit}."
    )
