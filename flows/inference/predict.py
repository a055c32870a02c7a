"""Runs a registered model over images: resumable, COCO results, optionally drawn images."""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.core.digest import digest_of
from flows.core.locks import locked
from flows.core.names import local_names
from flows.inference.coco_results import DATASET, PROGRESS, RESULTS, Progress, Row, write_coco
from flows.inference.images import UNUSABLE, SourceImage, fetch_image, list_images
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
DRAWN = "pictures"  # subfolder of the results


@dataclass(frozen=True)
class Predictions:
    """Summary of one call.

    `images` counts all images of the source, `detected` those processed in this call, `unreadable`
    the files that are not valid images, and `detections` the boxes.
    """

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
    """Detect objects in files, folders and s3:// prefixes.

    Writes to the folder or s3:// prefix `out`: `detections.json` (a COCO dataset with scores),
    `results.json` (COCO results) and, with `draw`, images with the detections drawn in. After an
    interruption the same call resumes after the last finished batch, also on another machine if
    `out` is on S3. Another model or threshold, or a change of `draw`, starts from scratch. Files
    that are not valid images are skipped and listed in the results.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold must be between 0 and 1; got {threshold}.")
    registry = Registry(project.params.registry.name, project.tracking_uri)
    version = find_version(registry, model)
    folder = _working_folder(out, project.env.state_dir)
    images = list_images(sources, exclude=folder)
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
        uploads = _Uploads(folder, out)
        progress = Progress(folder, header)
        remaining = [image for image in images if progress.row(image) is None]
        if remaining:
            detector = load_version(registry, version, Path(temporary))
            progress.set_categories(detector.model.label_names())
            drawn = _drawn_files(images, folder) if draw else {}
            for batch in _loaded(remaining, Path(temporary)):
                progress.add(_detect(detector, batch, threshold, drawn))
                uploads.tick()
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
    )


def find_version(registry: Registry, model: str | None) -> Version:
    """A version by number or alias (default: champion). Raises ConfigError if there is none."""
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
    """The detector of a model folder's `artifacts`. Raises ConfigError if weights are missing."""
    from rfdetr import RFDETR

    weights = next((f for f in artifacts.iterdir() if f.suffix in {".pth", ".ckpt"}), None)
    if weights is None:
        raise ConfigError(f"{artifacts} has no .pth or .ckpt file; register the model again")
    return RFDETR.from_checkpoint(str(weights), **overrides)


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


Loaded = tuple[SourceImage, Any]  # with its RGB pixels, or the InputError of an unreadable file


def _loaded(images: Sequence[SourceImage], folder: Path) -> Iterator[list[Loaded]]:
    """Batches with their pixels; the next batch is fetched and decoded in the background."""
    from tqdm import tqdm

    client = make_client() if any(is_s3(image.address) for image in images) else None
    batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    bar = tqdm(total=len(images), unit="image", disable=not sys.stderr.isatty())
    with ThreadPoolExecutor(1) as pool, bar:
        pending = pool.submit(_load, batches[0], folder, client)
        for following in itertools.chain(batches[1:], [None]):
            batch = pending.result()
            if following is not None:
                pending = pool.submit(_load, following, folder, client)
            yield batch
            bar.update(len(batch))


def _load(batch: Sequence[SourceImage], folder: Path, client: Any) -> list[Loaded]:
    from rfdetr.data.image_input import read_image

    pixels: dict[str, Any] = {}

    def load(item: tuple[int, SourceImage]) -> None:
        number, image = item
        target = folder / f"image-{number}{Path(image.name).suffix}"
        try:
            pixels[image.name] = read_image(fetch_image(image, target, client))
        except (InputError, *UNUSABLE) as error:
            reason = str(error).replace(str(target), image.address)
            pixels[image.name] = InputError(reason)
        target.unlink(missing_ok=True)

    on_threads(load, enumerate(batch))
    return [(image, pixels[image.name]) for image in batch]


def _detect(
    detector: RFDETR, batch: Sequence[Loaded], threshold: float, drawn: Mapping[str, Path]
) -> list[Row]:
    readable = [pixels for _, pixels in batch if not isinstance(pixels, InputError)]
    found = iter(detector.predict(readable, threshold=threshold) if readable else [])
    rows = []
    for image, pixels in batch:
        row: Row = {"file_name": image.name, "stamp": image.stamp}
        if isinstance(pixels, InputError):
            print(f"skipped: {pixels}", file=sys.stderr)
            rows.append({**row, "error": str(pixels)})
            continue
        detections = next(found)
        rows.append({**row, **_fields(pixels, detections)})
        if image.name in drawn:
            _draw(pixels, detections, drawn[image.name])
    return rows


def _fields(pixels: Any, detections: Any) -> Row:
    from rfdetr.data.image_input import height_and_width

    height, width = height_and_width(pixels)
    fields: Row = {
        "width": width,
        "height": height,
        "boxes": [[round(float(v), 2) for v in box] for box in detections.xyxy],
        "scores": [round(float(score), 5) for score in detections.confidence],
        "labels": [int(label) for label in detections.class_id],
        "names": [str(name) for name in detections.data["class_name"]],
    }
    if detections.mask is not None:
        from rfdetr.data.masks import encode

        fields["masks"] = [encode(mask)["counts"].decode() for mask in detections.mask]
    return fields


def _drawn_files(images: Sequence[SourceImage], folder: Path) -> dict[str, Path]:
    """Image name -> file of the image with its detections drawn in, which is a JPEG file."""
    wanted = {
        i.name: i.name if i.name.lower().endswith((".jpg", ".jpeg")) else f"{i.name}.jpg"
        for i in images
    }
    return {name: folder / DRAWN / path for name, path in local_names(wanted).items()}


def _draw(pixels: Any, detections: Any, target: Path) -> None:
    import supervision

    from rfdetr.data.image_input import as_rgb_image

    labels = [
        f"{name} {score:.2f}"
        for name, score in zip(detections.data["class_name"], detections.confidence, strict=True)
    ]
    image = as_rgb_image(pixels).copy()
    image = supervision.BoxAnnotator(thickness=1).annotate(image, detections)
    image = supervision.LabelAnnotator(text_scale=0.3, text_padding=1).annotate(
        image, detections, labels=labels
    )
    with atomic_path(target) as temporary:
        image.save(temporary, "JPEG", quality=90)
