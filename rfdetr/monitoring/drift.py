"""How far recent images have drifted from the training images.

Every measure has a value, a noise level and a threshold, and alarms when its value is above both
others. The noise level comes from a permutation test: recent and reference images are shuffled many
times and measured again. Images are shuffled, not boxes, because boxes of one image are related.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from rfdetr.arrays import Bools, Floats, Integers
from rfdetr.errors import ConfigError, InputError
from rfdetr.monitoring.drift_report import DriftReport, Measure
from rfdetr.monitoring.image_profile import ImageProfile, embedded_images

BINS = 10
SHUFFLES = 1000
NOISE_QUANTILE = 0.999  # of the shuffled values; the noise level
MOST_UNUSUAL = 12  # images that a report names
CONTENT_SHIFT = 0.25  # population stability index, commonly read as a major shift
APPEARANCE_SHIFT = 1.0  # the same for appearance, which varies more between samples without drift
ALARM_THRESHOLDS: dict[str, float] = {
    "embedding": 0.05,
    "brightness": APPEARANCE_SHIFT,
    "contrast": APPEARANCE_SHIFT,
    "sharpness": APPEARANCE_SHIFT,
    "image_size": APPEARANCE_SHIFT,
    "image_shape": APPEARANCE_SHIFT,
    "best_score": CONTENT_SHIFT,
    "boxes_per_image": CONTENT_SHIFT,
    "scores": CONTENT_SHIFT,
    "box_size": CONTENT_SHIFT,
    "classes": CONTENT_SHIFT,
}
APPEARANCE_MEASURES = ("brightness", "contrast", "sharpness", "image_size", "image_shape")
CONTENT_MEASURES = ("best_score", "boxes_per_image", "scores", "box_size", "classes")


def compare(
    reference: ImageProfile,
    recent: ImageProfile,
    thresholds: Mapping[str, float | None] | None = None,
) -> DriftReport:
    """Measure `recent` against `reference`; the same profiles always give the same report.

    `thresholds` replace the defaults of `ALARM_THRESHOLDS` by name; None disables an alarm. Raises
    ConfigError for an unknown name, InputError for profiles of different models.
    """
    limits = _limits(thresholds or {})
    if reference.class_names != recent.class_names or (
        reference.embeddings.shape[1] != recent.embeddings.shape[1]
    ):
        raise InputError("The profiles come from different models; make both with the same one.")
    distances = _distances(reference, recent)
    measures = [_embedding(distances, len(reference.embeddings), limits["embedding"])]
    everything = np.ones(len(reference), dtype=bool)
    held_out = reference.held_out if reference.held_out.any() else everything
    for names, rows in ((APPEARANCE_MEASURES, everything), (CONTENT_MEASURES, held_out)):
        shuffles = _shuffles(int(rows.sum()), len(recent))
        for name in names:
            limit = limits[name]
            measures.append(
                _histogram(name, reference, recent, rows=rows, shuffles=shuffles, limit=limit)
            )
    to_reference = distances[len(reference.embeddings) :, : len(reference.embeddings)].mean(axis=1)
    farthest = embedded_images(len(recent))[np.argsort(-to_reference, kind="stable")[:MOST_UNUSUAL]]
    return DriftReport(
        drifted=any(measure.drifted for measure in measures),
        measures=tuple(measures),
        reference_images=len(reference),
        recent_images=len(recent),
        unreadable=recent.unreadable,
        unusual=tuple(recent.files[i] for i in farthest),
    )


def _limits(given: Mapping[str, float | None]) -> dict[str, float | None]:
    unknown = sorted(set(given) - set(ALARM_THRESHOLDS))
    if unknown:
        raise ConfigError(f"Unknown measures {unknown}; known: {', '.join(ALARM_THRESHOLDS)}.")
    return {name: given.get(name, default) for name, default in ALARM_THRESHOLDS.items()}


def _shuffles(reference: int, recent: int) -> Floats:
    """(SHUFFLES, reference + recent): 1 for images assigned to the reference."""
    order = np.random.default_rng(0).random((SHUFFLES, reference + recent)).argsort(axis=1)
    return (order < reference).astype(np.float64)


def _measure(
    name: str, raw: Floats, shuffled: Floats, limit: float | None, means: tuple[float, ...] = ()
) -> Measure:
    value = max(0.0, float(raw[0]) - float(shuffled.mean()))
    noise = float(np.quantile(shuffled, NOISE_QUANTILE) - shuffled.mean())
    drifted = limit is not None and value > max(limit, noise)
    rounded = [round(mean, 4) if np.isfinite(mean) else None for mean in means] or [None, None]
    return Measure(
        name=name,
        value=round(value, 6),
        noise=round(noise, 6),
        threshold=limit,
        drifted=drifted,
        reference=rounded[0],
        recent=rounded[1],
    )


def _distances(reference: ImageProfile, recent: ImageProfile) -> Floats:
    """Euclidean distances (n + m, n + m) of all embeddings, dimensions scaled to unit spread."""
    vectors = np.concatenate([reference.embeddings, recent.embeddings]).astype(np.float64)
    spread = reference.embeddings.astype(np.float64).std(axis=0)
    vectors /= np.maximum(spread, spread.mean() / 10 + 1e-9)
    distances: Floats = cdist(vectors, vectors)
    return distances


def _embedding(distances: Floats, reference: int, limit: float | None) -> Measure:
    recent = len(distances) - reference
    actual = np.repeat([[1.0, 0.0]], [reference, recent], axis=1)
    shuffled = _energy(distances, _shuffles(reference, recent))
    return _measure("embedding", _energy(distances, actual), shuffled, limit)


def _energy(distances: Floats, is_reference: Floats) -> Floats:
    """Relative energy distance (2 E|X-Y| - E|X-X'| - E|Y-Y'|) / 2 E|X-Y|, per row of shuffles.

    Szekely and Rizzo, "Energy statistics" (2013); unbiased, so it may be a little below 0.
    """
    n = float(is_reference[0].sum())
    m = len(distances) - n
    near: Floats = is_reference @ distances
    inside: Floats = (near * is_reference).sum(axis=1)
    across: Floats = (near * (1 - is_reference)).sum(axis=1)
    outside = distances.sum() - inside - 2 * across
    cross = 2 * across / (n * m)
    own = inside / max(1.0, n * (n - 1)) + outside / max(1.0, m * (m - 1))
    relative: Floats = np.divide(cross - own, cross, out=np.zeros_like(cross), where=cross > 0)
    return relative


def _histogram(
    name: str,
    reference: ImageProfile,
    recent: ImageProfile,
    *,
    rows: Bools,
    shuffles: Floats,
    limit: float | None,
) -> Measure:
    """One measure over the images `rows` of the reference and all recent images."""
    old, old_owner = values_of(name, reference)
    old, old_owner = old[rows[old_owner]], (rows.cumsum() - 1)[old_owner[rows[old_owner]]]
    new, new_owner = values_of(name, recent)
    edges = np.unique(old) if name == "classes" else edges_of(old)
    values = np.concatenate([old, new])
    owner = np.concatenate([old_owner, new_owner + rows.sum()])
    bins = np.searchsorted(edges, values, "left") + np.searchsorted(edges, values, "right")
    counts = np.zeros((shuffles.shape[1], 2 * len(edges) + 1))
    np.add.at(counts, (owner, bins), 1.0)
    actual = np.repeat([[1.0, 0.0]], [rows.sum(), len(recent)], axis=1)
    means = (_mean(old), _mean(new)) if name != "classes" else ()
    return _measure(name, _stability(counts, actual), _stability(counts, shuffles), limit, means)


def values_of(name: str, profile: ImageProfile) -> tuple[Floats, Integers]:
    """The values of a measure and the image number of each."""
    if name in profile.features:
        return profile.features[name].astype(np.float64), np.arange(len(profile))
    boxes = profile.scores >= 0 if name == "scores" else profile.counted
    sources: dict[str, NDArray[Any]] = {
        "scores": profile.scores,
        "box_size": profile.sizes,
        "classes": profile.labels,
    }
    return sources[name][boxes].astype(np.float64), profile.owner[boxes].astype(np.int64)


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")


def edges_of(values: Floats) -> Floats:
    """The distinct deciles; values equal to an edge get a bin of their own, as integers need it."""
    if not len(values):
        return np.zeros(0)
    shares = np.linspace(0, 1, BINS + 1)[1:-1]
    edges: Floats = np.unique(np.quantile(values, shares, method="inverted_cdf"))
    return edges


def _stability(counts: Floats, is_reference: Floats) -> Floats:
    """Population stability index sum (p - q) ln(p / q) for every row of `is_reference`.

    Half a count is added to every bin, so that empty ones stay finite.
    """
    old = is_reference @ counts + 0.5
    new = counts.sum(axis=0) - is_reference @ counts + 0.5
    p, q = (part / part.sum(axis=1, keepdims=True) for part in (old, new))
    index: Floats = ((p - q) * np.log(p / q)).sum(axis=1)
    return index
