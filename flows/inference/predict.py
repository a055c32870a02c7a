"""Runs a registered model over images: resumable, COCO results, optionally drawn images."""

from __future__ import annotations

import difflib
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.core.digest import digest_of
from flows.core.files import read_object
from flows.core.locks import locked
from flows.inference.coco_results import DATASET, PROGRESS, RESULTS, Progress, write_coco
from flows.inference.detections import (
    DRAWN,
    Least,
    best_scores,
    detect,
    drawn_files,
    loaded,
    with_ids,
)
from flows.inference.images import SourceImage, list_images
from flows.project.project import Project
from flows.registry.model_folder import DEFAULT_THRESHOLD
from flows.registry.registry import CHAMPION, Registry, Version
from flows.storage.objects import download, upload
from flows.storage.prefixes import upload_tree
from flows.storage.s3 import StorageError, is_s3
from rfdetr.errors import ConfigError

if TYPE_CHECKING:
    from rfdetr import RFDETR

SEARCHED = 4  # batches that are searched for the best score while nothing is found
CARD = "model.json"
UPLOAD_SECONDS = 60.0  # between two uploads of the progress file


@dataclass(frozen=True)
class Predictions:
    """Summary of one call.

    `images` counts all images of the source, `detected` those processed in this call, `unreadable`
    the files that are not valid images, and `detections` the boxes. `best` is the highest score of
    the first images of this call and the name of that image, if nothing reached the threshold.
    """

    images: int
    detected: int
    unreadable: int
    detections: int
    model: str
    version: int
    out: str
    drawn: bool
    best: tuple[float, str] | None = None


def predict_images(
    project: Project,
    sources: Sequence[str],
    out: str,
    *,
    model: str | None = None,
    threshold: float | None = None,
    draw: bool = True,
) -> Predictions:
    """Detect objects in files, folders and s3:// prefixes.

    Writes to the folder or s3:// prefix `out`: `detections.json` (a COCO dataset with scores),
    `results.json` (COCO results) and, with `draw`, images with the detections drawn in. After an
    interruption the same call resumes after the last finished batch, also on another machine if
    `out` is on S3. Without a threshold, the version's operating point decides, or 0.5 if it has
    none. Another model or threshold, or a change of `draw`, starts from scratch. Files
    that are not valid images are skipped and listed in the results.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"threshold must be between 0 and 1; got {threshold}.")
    registry = Registry(project.params.registry.name, project.tracking_uri)
    version = find_version(registry, model)
    at_point = threshold is None and version.operating_point is not None
    least: Least = DEFAULT_THRESHOLD if threshold is None else threshold
    if at_point:
        least = "operating_point"
    folder = _working_folder(out, project.env.state_dir)
    images = list_images(sources, exclude=folder)
    header = {
        "model": registry.name,
        "version": version.number,
        "weights_sha256": version.weights_sha256,
        "threshold": version.operating_point if at_point else least,
        "pictures": draw,
        "categories": "dataset",  # their ids
    }
    best = (0.0, "")
    with (
        locked(folder, wait=True),
        tempfile.TemporaryDirectory(prefix="rfdetr-predict-") as temporary,
    ):
        uploads = _Uploads(folder, out)
        progress = Progress(folder, header)
        remaining = [image for image in images if progress.row(image) is None]
        if remaining:
            artifacts = registry.fetch(version, Path(temporary)) / "artifacts"
            drawn = drawn_files(images, folder) if draw else {}
            best = _detect_all(artifacts, remaining, progress, uploads, least=least, drawn=drawn)
        rows = progress.rows(images)
        count = write_coco(folder, header, rows, progress.categories)
        uploads.finish()
    return Predictions(
        images=len(rows),
        detected=len(remaining),
        unreadable=sum("error" in row for row in rows),
        detections=count,
        model=registry.name,
        version=version.number,
        out=out,
        drawn=draw,
        best=best if remaining and not count and best[1] else None,
    )


def _detect_all(
    artifacts: Path,
    images: Sequence[SourceImage],
    progress: Progress,
    uploads: _Uploads,
    *,
    least: Least,
    drawn: Mapping[str, Path],
) -> tuple[float, str]:
    """Detect and record batch by batch.

    Returns the highest score of the first batches and its image, as far as these find nothing.
    """
    detector, ids = load_detector(artifacts), dataset_ids(artifacts)
    names = detector.model.label_names()
    progress.set_categories({ids.get(label, label): names[label] for label in names})
    levels = detector.model_config.grey_levels
    best = (0.0, "")
    with tempfile.TemporaryDirectory(prefix="rfdetr-predict-") as temporary:
        for number, batch in enumerate(loaded(images, Path(temporary), levels)):
            rows = detect(detector, batch, least, drawn)
            if number < SEARCHED and not any(row.get("boxes") for row in rows):
                best = max([best, *best_scores(detector, batch)])
            progress.add([with_ids(row, ids) for row in rows])
            uploads.tick()
    return best


def find_version(registry: Registry, model: str | None) -> Version:
    """A version by number or alias (default: champion). Raises ConfigError if there is none."""
    if model is not None and model.isdecimal():
        return registry.version(int(model))
    alias = model or CHAMPION
    version = registry.by_alias(alias)
    if version is not None:
        return version
    known = registry.aliases()
    found = f"{registry.name} has no version with the alias '{alias}'"
    if alias != CHAMPION:
        near = difflib.get_close_matches(alias, known, 1)
        advice = f"Did you mean {near[0]}?" if near else "A version number works too."
    elif next(registry.tagged({}), None) is None:
        advice = "Run `rfdetr-pipeline retrain` first."
    else:
        advice = (
            "`rfdetr-pipeline doctor --repair` restores a champion whose alias was removed; "
            "`rfdetr-pipeline promote VERSION --reason ...` chooses one."
        )
    raise ConfigError(f"{found} (aliases: {', '.join(known) or 'none'}). {advice}")


def load_detector(artifacts: Path, **overrides: Any) -> RFDETR:
    """The detector of a model folder's `artifacts`. Raises ConfigError if weights are missing."""
    from rfdetr import RFDETR

    return RFDETR.from_checkpoint(str(weights_in(artifacts)), **overrides)


def weights_in(artifacts: Path) -> Path:
    """The weights of a model folder's `artifacts`. Raises ConfigError if they are missing."""
    weights = next((f for f in artifacts.iterdir() if f.suffix in {".pth", ".ckpt"}), None)
    if weights is None:
        raise ConfigError(f"{artifacts} has no .pth or .ckpt file; register the model again")
    return weights


def dataset_ids(artifacts: Path) -> dict[int, int]:
    """Label of the model -> category id of its dataset, from the card; empty for an old card."""
    card = artifacts / CARD
    known = read_object(card).get("category_ids", []) if card.exists() else []
    return dict(enumerate(known))


def _working_folder(out: str, state_dir: Path) -> Path:
    """The local folder of the results: `out`, or for an s3:// prefix one in the state folder.

    Raises ConfigError if `out` is a file or below one.
    """
    if is_s3(out):
        return state_dir / "predictions" / digest_of([out.rstrip("/")])[:24]
    folder = Path(out)
    file = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
    if file is not None:
        raise ConfigError(f"the results need a folder, but {file} is a file; choose another --out.")
    return folder


class _Uploads:
    """Copies the results to an s3:// prefix; does nothing for a local folder."""

    def __init__(self, folder: Path, out: str) -> None:
        self.folder, self.out = folder, out.rstrip("/") if is_s3(out) else None
        self._last = time.monotonic()
        if self.out and not (folder / PROGRESS).exists():
            with suppress(StorageError):  # missing on the first call
                download(f"{self.out}/{PROGRESS}", folder / PROGRESS, progress=False)

    def tick(self) -> None:
        if self.out and time.monotonic() - self._last > UPLOAD_SECONDS:
            upload(self.folder / PROGRESS, f"{self.out}/{PROGRESS}", progress=False)
            self._last = time.monotonic()

    def finish(self) -> None:
        if self.out is None:
            return
        for name in (
            PROGRESS,
            RESULTS,
            DATASET,
        ):  # the dataset last: it completes the results
            if name == DATASET and (self.folder / DRAWN).is_dir():
                upload_tree(self.folder / DRAWN, f"{self.out}/{DRAWN}", progress=False)
            upload(self.folder / name, f"{self.out}/{name}", progress=False)
