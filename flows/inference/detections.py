"""Detections on a stream of images: decoded in the background, as rows, drawn."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows.core.names import local_names
from flows.inference.coco_results import Row
from flows.inference.images import UNUSABLE, SourceImage, fetch_image
from flows.storage.s3 import is_s3, make_client, on_threads
from rfdetr.errors import InputError
from rfdetr.files import atomic_path

if TYPE_CHECKING:
    from rfdetr import RFDETR
    from rfdetr.data.decode import Levels

BATCH = 8
DRAWN = "pictures"  # subfolder of the results

Least = float | Literal["operating_point"]  # threshold
Loaded = tuple[SourceImage, Any]  # with its RGB pixels, or the InputError of an unreadable file


def loaded(
    images: Sequence[SourceImage], folder: Path, levels: Levels | None
) -> Iterator[list[Loaded]]:
    """Batches with their pixels; the next batch is fetched and decoded in the background."""
    from tqdm import tqdm

    client = make_client() if any(is_s3(image.address) for image in images) else None
    batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
    bar = tqdm(total=len(images), unit="image", disable=not sys.stderr.isatty())
    with ThreadPoolExecutor(1) as pool, bar:
        pending = pool.submit(_load, batches[0], folder, client, levels)
        for following in itertools.chain(batches[1:], [None]):
            batch = pending.result()
            if following is not None:
                pending = pool.submit(_load, following, folder, client, levels)
            yield batch
            bar.update(len(batch))


def _load(
    batch: Sequence[SourceImage], folder: Path, client: Any, levels: Levels | None
) -> list[Loaded]:
    from rfdetr.data.image_input import read_image

    pixels: dict[str, Any] = {}

    def load(item: tuple[int, SourceImage]) -> None:
        number, image = item
        target = folder / f"image-{number}{Path(image.name).suffix}"
        try:
            pixels[image.name] = read_image(fetch_image(image, target, client), levels)
        except (InputError, *UNUSABLE) as error:
            reason = str(error).replace(str(target), image.address)
            pixels[image.name] = InputError(reason)
        target.unlink(missing_ok=True)

    on_threads(load, enumerate(batch))
    return [(image, pixels[image.name]) for image in batch]


def detect(
    detector: RFDETR, batch: Sequence[Loaded], threshold: Least, drawn: Mapping[str, Path]
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


def drawn_files(images: Sequence[SourceImage], folder: Path) -> dict[str, Path]:
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


def with_ids(row: Row, ids: Mapping[int, int]) -> Row:
    """The row with category ids as labels."""
    if "labels" not in row:
        return row
    return {**row, "labels": [ids.get(label, label) for label in row["labels"]]}


def best_scores(detector: RFDETR, batch: Sequence[Loaded]) -> Iterator[tuple[float, str]]:
    """The highest score of each readable image, and its name."""
    readable = [
        (image.name, pixels) for image, pixels in batch if not isinstance(pixels, InputError)
    ]
    pictures = [pixels for _, pixels in readable]
    found: Any = detector.predict(pictures, threshold=0.0) if pictures else []
    for (name, _), detections in zip(readable, found, strict=True):
        yield max(map(float, detections.confidence), default=0.0), name
