"""Scores of champion and challenger on the current test set, cached by content."""

from __future__ import annotations

import contextlib
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from flows.core.digest import digest_of
from flows.core.files import read_record
from flows.gate.verdict import Scores
from flows.project.project import Project
from flows.registry.registry import Registry, Version
from rfdetr.errors import ConfigError, RFDETRError
from rfdetr.files import sha256_file, write_text_atomic

if TYPE_CHECKING:
    from flows.gate.scored_model import ScoredModel

SUSPECTS = 12  # shown in the report
CACHE_VERSION = 4  # increased when cached scores lack something that the gate needs


def champion_scores(project: Project, registry: Registry, champion: Version, digest: str) -> Scores:
    """Scores of the champion on the current test set. Raises RFDETRError without its weights."""
    label = f"version {champion.number}"
    cached = _cache_file(project, str(champion.weights_sha256), digest)
    if (known := _cached(cached)) is not None:
        return known.model_copy(update={"model": label})
    with tempfile.TemporaryDirectory(prefix="rfdetr-champion-") as folder:
        model = registry.fetch(champion, Path(folder))
        weights = next((model / "artifacts").glob("*.pth"), None)
        if weights is None:
            raise RFDETRError(
                f"{registry.name} {label} is champion, but its weights are missing in the artifact "
                "store, so it cannot be compared. Restore its artifacts, or roll back to a version "
                "that still has them."
            )
        return scores_of(project, weights, label, digest)


def scores_of(project: Project, weights: Path, label: str, digest: str) -> Scores:
    """Scores of a weights file on the current test set, computed once."""
    cached = _cache_file(project, sha256_file(weights), digest)
    if (known := _cached(cached)) is not None:
        return known.model_copy(update={"model": label})

    from flows.gate.scoring import score_model  # slow imports
    from flows.storage.packs import open_dataset

    params = project.params
    scored = score_model(
        weights,
        open_dataset(project.dataset_dir, project.env.state_dir),
        params.dataset,
        params.evaluate,
        slices=project.slices,
        accelerator=params.runtime.accelerator,
        num_workers=params.runtime.num_workers,
    )
    return keep(project, scored, label, digest)


def keep(project: Project, scored: ScoredModel, label: str, digest: str) -> Scores:
    """Cache the scores of a model on the test set with content `digest`."""
    from flows.gate.suspected_labels import image_files, suspected_labels
    from flows.storage.packs import open_dataset

    params = project.params
    root = Path(open_dataset(project.dataset_dir, project.env.state_dir))
    files = image_files(root, params.dataset, params.evaluate.split)
    suspects = suspected_labels(scored, files, root, SUSPECTS)
    scores = scored.scores(label, digest).model_copy(update={"suspects": tuple(suspects)})
    text = scores.model_dump_json()
    write_text_atomic(_cache_file(project, scored.weights_sha256, digest), text)
    return scores


def _cached(file: Path) -> Scores | None:
    """The cached scores; None if there are none, or the file is damaged."""
    with contextlib.suppress(ConfigError):
        return read_record(file, Scores)
    return None


def _cache_file(project: Project, weights_sha256: str, digest: str) -> Path:
    """The file of the scores: per machine if the gate has a latency budget."""
    params = project.params
    machine = platform.node() if params.gate.max_latency_ms is not None else None
    how = [params.evaluate.key(project.slices), params.evaluate.batch_size, params.dataset.layout]
    where = [params.runtime.accelerator, machine]
    key = digest_of([CACHE_VERSION, weights_sha256, digest, *how, *where])[:32]
    return project.env.state_dir / "scores" / f"{key}.json"
