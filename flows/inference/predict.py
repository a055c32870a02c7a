"""A registered model over images: COCO results, resumable, with drawn pictures if wanted."""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.core.digest import digest_of
from flows.core.locks import locked
from flows.inference.coco_results import DATASET, PROGRESS, RESULTS, Progress, Row, write_coco
from flows.inference.images import Picture, fetch_picture, list_pictures
from flows.project.project import Project
from flows.registry.registry import CHAMPION, Registry, Version
from flows.storage.objects import download, upload
from flows.storage.prefixes import upload_tree
from flows.storage.s3 import StorageError, is_s3, make_client, on_threads
from rfdetr.errors import ConfigError, InputError
from rfdetr.files import atomic_path

if TYPE_CHECKING:
    from rfdetr import RFDETR

BATCH = 8
UPLOAD_SECONDS = 60.0  # between two uploads of the progress file
PICTURES = "pictures"


@dataclass(frozen=True)
class Predictions:
    """What a call came to: all images, those it detected on itself, unreadable ones, boxes."""

    images: int
    detected: int
    unreadable: int
    detections: int
    model: str
    version: int
    out: str


def predict_images(
    project: Project,
    sources: Sequence[str],
    out: str,
    *,
    model: str | None = None,
    threshold: float = 0.5,
    draw: bool = True,
) -> Predictions:
    """Detect on files, folders and s3:// prefixes.

    Writes into the folder or s3:// prefix `out`: `detections.json` (a COCO dataset with scores),
    `results.json` (COCO results) and drawn pictures. Interrupted, the same call goes on after the
    last finished batch, also on another machine when `out` is on S3; another model or threshold,
    or pictures that were not wanted before, start anew. A file that is no image is named in the
    results and does not stop the others.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold is a score from 0 to 1; got {threshold}.")
    registry = Registry(project.params.registry.name, project.tracking_uri)
    version = find_version(registry, model)
    folder = _working_folder(out, project.env.state_dir)
    pictures = list_pictures(sources, leave_out=folder)
    header = {
        "model": registry.name,
        "version": version.number,
        "weights_sha256": version.weights_sha256,
        "threshold": threshold,
        "pictures": draw,
    }
    with (
        locked(folder, wait=True),
        tempfile.TemporaryDirectory(prefix="rfdetr-predict-") as temporary,
    ):
        keeper = _Keeper(folder, out)
        progress = Progress(folder, header)
        waiting = [picture for picture in pictures if progress.row(picture) is None]
        if waiting:
            detector = load_version(registry, version, Path(temporary))
            for batch in _loaded(waiting, Path(temporary)):
                progress.add(_detect(detector, batch, threshold, folder if draw else None))
                keeper.tick()
        rows = [row for row in map(progress.row, pictures) if row is not None]
        count = write_coco(folder, header, rows)
        keeper.finish()
    unreadable = sum("error" in row for row in rows)
    return Predictions(
        len(rows), len(waiting), unreadable, count, registry.name, version.number, out
    )


def find_version(registry: Registry, model: str | None) -> Version:
    """A version by number or alias (default: champion). Raises ConfigError when there is none."""
    if model is not None and model.isdecimal():
        return registry.version(int(model))
    version = registry.by_alias(model or CHAMPION)
    if version is None:
        known = ", ".join(registry.aliases()) or "none"
        raise ConfigError(
            f"{registry.name} has no version with the alias '{model or CHAMPION}' (aliases: "
            f"{known}). Run `rfdetr-pipeline retrain` first."
        )
    return version


def load_version(registry: Registry, version: Version, folder: Path) -> RFDETR:
    """The detector of a registered version."""
    return load_detector(registry.fetch(version, folder) / "artifacts")


def load_detector(artifacts: Path, **overrides: Any) -> RFDETR:
    """The detector of a model folder's `artifacts`. Raises ConfigError without weights."""
    from rfdetr import RFDETR

    weights = next((f for f in artifacts.iterdir() if f.suffix in {".pth", ".ckpt"}), None)
    if weights is None:
        raise ConfigError(f"{artifacts} holds no weights (.pth or .ckpt); register the model again")
    return RFDETR.from_checkpoint(str(weights), **overrides)


def _working_folder(out: str, state_dir: Path) -> Path:
    """Where results grow: `out`, or for an s3:// prefix a folder of the state."""
    if is_s3(out):
        return state_dir / "predictions" / digest_of([out.rstrip("/")])[:24]
    return Path(out)


class _Keeper:
    """Copies results to an s3:// prefix; does nothing for a folder."""

    def __init__(self, folder: Path, out: str) -> None:
        self.folder, self.out = folder, out.rstrip("/") if is_s3(out) else None
        self._last = time.monotonic()
        if self.out and not (folder / PROGRESS).exists():
            with suppress(StorageError):  # nothing there: a first run
                download(f"{self.out}/{PROGRESS}", folder / PROGRESS, progress=False)

    def tick(self) -> None:
        if self.out and time.monotonic() - self._last > UPLOAD_SECONDS:
            upload(self.folder / PROGRESS, f"{self.out}/{PROGRESS}", progress=False)
            self._last = time.monotonic()

    def finish(self) -> None:
        if self.out is None:
            return
        for name in (PROGRESS, RESULTS, DATASET):  # the dataset last: it says that all is there
            if name == DATASET and (self.folder / PICTURES).is_dir():
                upload_tree(self.folder / PICTURES, f"{self.out}/{PICTURES}", progress=False)
            upload(self.folder / name, f"{self.out}/{name}", progress=False)


Loaded = tuple[Picture, Any]  # RGB pixels, or the InputError that says why there are none


def _loaded(pictures: Sequence[Picture], folder: Path) -> Iterator[list[Loaded]]:
    """Batches with their pixels; the next one is fetched and decoded meanwhile."""
    from tqdm import tqdm

    client = make_client() if any(is_s3(picture.place) for picture in pictures) else None
    batches = [pictures[i : i + BATCH] for i in range(0, len(pictures), BATCH)]
    bar = tqdm(total=len(pictures), unit="image", disable=not sys.stderr.isatty())
    with ThreadPoolExecutor(1) as pool, bar:
        coming = pool.submit(_load, batches[0], folder, client)
        for following in itertools.chain(batches[1:], [None]):
            batch = coming.result()
            if following is not None:
                coming = pool.submit(_load, following, folder, client)
            yield batch
            bar.update(len(batch))


def _load(batch: Sequence[Picture], folder: Path, client: Any) -> list[Loaded]:
    from rfdetr.data.image_input import read_image

    pixels: dict[str, Any] = {}

    def load(item: tuple[int, Picture]) -> None:
        number, picture = item
        target = folder / f"picture-{number}{Path(picture.name).suffix}"
        try:
            pixels[picture.name] = read_image(fetch_picture(picture, target, client))
        except (InputError, FileNotFoundError) as error:
            reason = str(error).replace(str(target), picture.place)
            pixels[picture.name] = InputError(reason)
        target.unlink(missing_ok=True)

    on_threads(load, enumerate(batch))
    return [(picture, pixels[picture.name]) for picture in batch]


def _detect(
    detector: RFDETR, batch: Sequence[Loaded], threshold: float, folder: Path | None
) -> list[Row]:
    readable = [pixels for _, pixels in batch if not isinstance(pixels, InputError)]
    found = iter(detector.predict(readable, threshold=threshold) if readable else [])
    rows = []
    for picture, pixels in batch:
        row: Row = {"file_name": picture.name, "stamp": picture.stamp}
        if isinstance(pixels, InputError):
            print(f"passed over: {pixels}", file=sys.stderr)
            rows.append({**row, "error": str(pixels)})
            continue
        detections = next(found)
        rows.append({**row, **_facts(pixels, detections)})
        if folder is not None:
            _draw(pixels, detections, folder / PICTURES / _drawn_name(picture.name))
    return rows


def _facts(pixels: Any, detections: Any) -> Row:
    from rfdetr.data.image_input import height_and_width

    height, width = height_and_width(pixels)
    facts: Row = {
        "width": width,
        "height": height,
        "boxes": [[round(float(v), 2) for v in box] for box in detections.xyxy],
        "scores": [round(float(score), 5) for score in detections.confidence],
        "labels": [int(label) for label in detections.class_id],
        "names": [str(name) for name in detections.data["class_name"]],
    }
    if detections.mask is not None:
        from rfdetr.data.masks import encode

        facts["masks"] = [encode(mask)["counts"].decode() for mask in detections.mask]
    return facts


def _drawn_name(name: str) -> str:
    return name if name.lower().endswith((".jpg", ".jpeg")) else f"{name}.jpg"


def _draw(pixels: Any, detections: Any, target: Path) -> None:
    import supervision

    from rfdetr.data.image_input import as_rgb_image

    labels = [
        f"{name} {score:.2f}"
        for name, score in zip(detections.data["class_name"], detections.confidence, strict=True)
    ]
    picture = as_rgb_image(pixels).copy()
    picture = supervision.BoxAnnotator(thickness=1).annotate(picture, detections)
    picture = supervision.LabelAnnotator(text_scale=0.3, text_padding=1).annotate(
        picture, detections, labels=labels
    )
    with atomic_path(target) as temporary:
        picture.save(temporary, "JPEG", quality=90)
